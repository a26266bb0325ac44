"""The repository: links to the rooms, words that must not appear, modules that stay readable."""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ninerank"
ROOMS = ("embedding", "features", "towers", "predictor", "fusion", "proto")
LONGEST = 400

# Word by word, so that this file does not hold what it looks for.
FORBIDDEN = {
    "where wheels come from is for pip's own settings to say": [
        r"--(extra-)?index-" + r"url[ =]\S*/" + "/",
        r"download\.pytorch" + r"\.org",
        r"\bpypi" + r"\.org/simple",
    ],
    "unfinished work": [r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\braise NotImplemented" + r"Error\b"],
    "a path of one machine": [r"(?<![\w.])/work" + r"/", r"/home" + r"/\w+/", r"/root" + r"/"],
}


def tracked() -> list[Path]:
    """Files of the project as text can be searched: those git knows, or, outside a checkout, those that are there."""
    try:
        outcome = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
        names = [name for name in outcome.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [
            str(path.relative_to(ROOT))
            for folder in ("src", "tests", "scripts", "bench", "examples", "docs")
            for path in (ROOT / folder).rglob("*")
        ]
    paths = [ROOT / name for name in names]
    return [path for path in paths if path.is_file() and not path.is_symlink() and not _is_not_ours(path)]


def _is_not_ours(path: Path) -> bool:
    """Binary, or generated."""
    return path.suffix in {".parquet", ".png", ".pyc", ".safetensors"} or path.stem.endswith(("_pb2", "_pb2_grpc"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_from_the_root(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert link.readlink() == Path("src/ninerank") / room, "relative, so that a clone anywhere works"
    assert link.resolve() == PACKAGE / room
    assert (link / "__init__.py").is_file()


def test_a_room_in_the_package_has_an_init() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("reason", FORBIDDEN)
def test_no_forbidden_words(reason: str) -> None:
    pattern = re.compile("|".join(FORBIDDEN[reason]))
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == [], reason


def test_pandas_is_no_dependency() -> None:
    """pyarrow's to_pandas family imports it, which no lint of imports sees; where it happens to be installed no other test would fail."""
    leaning = [
        str(path.relative_to(ROOT))
        for path in modules()
        if re.search(r"\bto_pandas\w*\(|\bfrom_pandas\(", path.read_text(encoding="utf-8"))
    ]
    assert leaning == []


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base"}
    assert [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if path.stem in drawers or path.parent.name in drawers] == []


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc")) and path.name != "__init__.py"]


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert statistics.median(lengths.values()) < 200
    for path, length in lengths.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        reason = re.search(r"\bone module\b", docstring)
        assert length <= LONGEST or reason, f"{path.relative_to(ROOT)} has {length} lines and does not say why it is 'one module'"


def test_every_module_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []
