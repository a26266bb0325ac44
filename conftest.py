"""Collects the package's doctests under the names that the package is imported by.

Without this, pytest's importlib mode imports src/ninerank/x/y.py a second time as `src.ninerank.x.y`: every class twice, and what Numba
keeps on disk bound to a name that other programs cannot import.
"""

import contextlib
import importlib
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "src"
# It imports TorchRec as it loads, which warns of itself, and has no doctests.
collect_ignore = [str(SOURCE / "ninerank" / "embedding" / "sharding" / "torchrec.py")]


def pytest_collect_file(file_path: Path) -> None:
    if file_path.suffix == ".py" and file_path.is_relative_to(SOURCE):
        parts = file_path.relative_to(SOURCE).with_suffix("").parts
        with contextlib.suppress(ImportError):  # the collector tells of it
            importlib.import_module(".".join(part for part in parts if part != "__init__"))
