"""Imports: what loads when, and what the package does without."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import ninerank
from ninerank.cli.main import VERBS

PACKAGE = Path(ninerank.__file__).parent
HEAVY = ("torch", "numpy", "pyarrow", "numba", "grpc", "redis", "torchrec", "fbgemm_gpu", "triton", "matplotlib", "sklearn", "pandas")
OPTIONAL = ("torchrec", "fbgemm_gpu", "triton", "torch_npu", "redis", "matplotlib", "tensorboard", "sklearn", "pandas")
WIRE = ("grpc", "google", "grpc_health", "grpc_reflection", "prometheus_client")
# The rooms that speak the wire format; import-linter holds it for everything they import.
SPEAKERS = ("ninerank.predictor", "ninerank.proto", "ninerank.evaluation", "ninerank.cli")


def all_modules() -> list[str]:
    """Every module but the adapters, which are named after the one optional package that they are there to import."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] not in {"__main__", *OPTIONAL}:
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def loaded_after(statement: str, blocked: Iterable[str] = ()) -> set[str]:
    """Modules that a fresh interpreter has loaded after `statement`, with the `blocked` ones not installed."""
    code = f"""
import json, sys
for name in {list(blocked)!r}:
    sys.modules[name] = None
{statement}
print(json.dumps([name for name, module in sys.modules.items() if module is not None]))
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return set(json.loads(outcome.stdout.splitlines()[-1]))


def test_import_ninerank_loads_nothing_but_itself() -> None:
    loaded = loaded_after("import ninerank")
    assert {name for name in loaded if name.partition(".")[0] == "ninerank"} == {"ninerank"}
    assert not loaded & {*HEAVY, "pydantic", "typer", "rich", "yaml"}


def test_import_of_the_command_line_is_light() -> None:
    names = ", ".join(f"ninerank.cli.{verb}" for verb in VERBS)
    loaded = loaded_after(f"import ninerank.cli.main, {names}")
    assert not loaded & {*HEAVY, *WIRE}


def test_help_is_light() -> None:
    loaded = loaded_after("from ninerank.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass")
    assert not loaded & {*HEAVY, *WIRE}


def test_every_public_name_is_there() -> None:
    for name in ninerank.__all__:
        assert getattr(ninerank, name) is not None
    assert set(ninerank.__all__) <= set(dir(ninerank))


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Nope'; public names: .*FeatureSpec"):
        _ = ninerank.Nope  # type: ignore[attr-defined]


def test_a_laptop_needs_no_optional_package() -> None:
    """torchrec, fbgemm, triton, torch_npu, redis, plots: every module loads without them."""
    loaded_after(f"import {', '.join(all_modules())}", blocked=OPTIONAL)


def test_training_needs_no_wire_format() -> None:
    names = [name for name in all_modules() if not name.startswith(SPEAKERS)]
    assert len(names) > 15
    loaded_after(f"import {', '.join(names)}", blocked=(*OPTIONAL, *WIRE))


@pytest.mark.parametrize(("found", "already", "expected"), [(True, False, "0"), (False, False, None), (True, True, None)])
def test_torch_does_not_load_a_backend_on_its_own(found: bool, already: bool, expected: str | None, tmp_path: Path) -> None:
    """With torch_npu installed and no CANN, `import torch` fails unless this variable is set before it."""
    if found:
        (tmp_path / "torch_npu.py").write_text("raise ImportError('libascendcl.so')")
    code = f"""
import os, sys
os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
sys.path.insert(0, {str(tmp_path)!r})
if {already}:
    sys.modules["torch"] = sys
import ninerank
print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == str(expected)


def test_who_set_the_variable_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("")
    code = f"""
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "1"
sys.path.insert(0, {str(tmp_path)!r})
import ninerank
print(os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"])
"""
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == "1"
