"""The wheel: built, installed in a clean environment away from the checkout, complete, and alone under its name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "ninerank"
DATA_SUFFIXES = {".proto", ".pyi", ".html", ".svg", ".css", ".js", ".json", ".yaml", ".typed"}


def run(*command: object, **options: object) -> str:
    outcome = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert outcome.returncode == 0, f"{command}\n{outcome.stdout}{outcome.stderr}"
    return str(outcome.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing left over from an earlier build gets in and nothing is left behind."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, source)
    return next(place.glob("ninerank-*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment that holds the wheel and nothing else."""
    place = tmp_path_factory.mktemp("clean") / "env"
    venv.create(place, with_pip=False, symlinks=True)
    interpreter = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return interpreter


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sources() -> Iterator[Path]:
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(PACKAGE.parent)


def test_ninerank_is_its_only_import_name(names: set[str], clean: Path) -> None:
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ninerank"}
    purelib = next((clean.parent.parent / "lib").glob("python*/site-packages"))
    assert {path.name for path in purelib.iterdir() if not path.name.endswith(".dist-info")} == {"ninerank"}


def test_every_module_is_inside(names: set[str]) -> None:
    modules = {path.as_posix() for path in sources() if path.suffix == ".py"}
    assert len(modules) > 20
    assert modules <= names
    assert {name for name in names if name.endswith(".py")} == modules


def test_every_data_file_is_inside(names: set[str]) -> None:
    data = {path.as_posix() for path in sources() if path.suffix in DATA_SUFFIXES or path.name == "py.typed"}
    assert "ninerank/py.typed" in data
    assert any(name.endswith(".proto") for name in data)
    assert data <= names


def test_every_kind_of_file_is_known() -> None:
    kinds = {path.suffix for path in sources()} - {".py", ""}
    assert kinds <= DATA_SUFFIXES, "name the new kind in pyproject.toml's package-data and here"


def test_licence_is_inside(names: set[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_import_needs_nothing_else(clean: Path, tmp_path: Path) -> None:
    place, version = run(clean, "-c", "import ninerank; print(ninerank.__file__, ninerank.__version__)", cwd=tmp_path, env=_bare()).split()
    assert Path(place).is_relative_to(clean.parent.parent)
    assert version[0].isdigit()


def test_the_command_runs_away_from_the_checkout(clean: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment on the path; its link to the checkout is not followed from there."""
    dependencies = {**_bare(), "PYTHONPATH": sysconfig.get_path("purelib")}
    assert "doctor" in run(clean.parent / "ninerank", "--help", cwd=tmp_path, env=dependencies)
    code = "import ninerank.features.batch as b; print(b.__file__)"
    assert Path(run(clean, "-c", code, cwd=tmp_path, env=dependencies).strip()).is_relative_to(clean.parent.parent)


def _bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "OMP_NUM_THREADS"}}
