"""The lane cannot be green by looking away: what raises is red, red is exit code 1, and an environment that is not there is no skip."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"devices_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    return load(Path(__file__).with_name("lane.py"))


def refuse() -> str:
    raise AssertionError("copy from npu to cpu\nmore of it")


def crash() -> str:
    raise KeyError("model")


def test_what_raises_is_red(lane: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    found = lane.Lane()
    for name, check in (("good", lambda: "seen"), ("bad", refuse), ("worse", crash)):
        found.check("step", name, check)
    assert (found.count, found.failed) == (3, ["step: bad", "step: worse"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["ok", "RED", "RED"]
    assert "     more of it" in lines
    assert "KeyError: 'model'" in lines[-1]


@pytest.mark.parametrize(("check", "code"), [(lambda: "seen", 0), (refuse, 1)])
def test_one_red_line_is_exit_code_1(lane: ModuleType, monkeypatch: pytest.MonkeyPatch, check: object, code: int) -> None:
    monkeypatch.setenv(lane.INNER, "none")
    monkeypatch.setattr(lane, "_npu", lambda own: own.check("step", "one", check))
    assert lane.main(["npu"]) == code


def test_without_torch_npu_the_lane_fails(lane: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(lane.INNER, raising=False)
    monkeypatch.setattr(lane, "find_spec", lambda name: None)
    assert lane.main(["npu"]) == 1
    assert "error: torch_npu is not installed here" in capsys.readouterr().err
    assert lane.main(["tpu"]) == 2


@pytest.mark.parametrize(
    ("with_check", "without", "wrong"),
    [
        ([], [], "not found: it was let through"),
        (["copy; asked for at collection.py"], [], "collection.py"),
        (["copy; asked for at defects.py:31"], ["no kernel; asked for at defects.py:31"], "found by another check"),
        (["copy; asked for at defects.py:31"], [], None),
    ],
)
def test_a_defect_must_be_found_by_its_own_check(
    lane: ModuleType, monkeypatch: pytest.MonkeyPatch, with_check: list[str], without: list[str], wrong: str | None
) -> None:
    is_off = False

    @contextmanager
    def switched_off(defect: str):  # type: ignore[no-untyped-def]
        nonlocal is_off
        is_off = True
        yield
        is_off = False

    step = SimpleNamespace(name="dnn")
    traced = SimpleNamespace(steps=lambda: [step], train=lambda *_: SimpleNamespace(findings=without if is_off else with_check))
    monkeypatch.setitem(sys.modules, "steps", traced)
    monkeypatch.setitem(sys.modules, "defects", SimpleNamespace(Copies=None, switched_off=switched_off))
    if wrong is None:
        assert lane._found("npu", "Copies") == "found: copy; asked for at defects.py:31"
    else:
        with pytest.raises(AssertionError, match=wrong):
            lane._found("npu", "Copies")


@pytest.mark.parametrize("lacking", ["gcc", "nm", "python"])
def test_an_environment_that_cannot_be_made_is_an_error(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ascend = load(ROOT / "scripts" / "ascend.py")
    monkeypatch.setattr(ascend, "VENV", tmp_path / "venv")
    monkeypatch.setattr(ascend, "STAMP", tmp_path / "venv" / "stamp")
    monkeypatch.setattr(ascend.shutil, "which", lambda name: None if name == lacking else f"/usr/bin/{name}")
    if lacking == "python":
        monkeypatch.setattr(ascend, "_version", lambda name: "3.12")
    assert ascend.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert {"gcc": "gcc", "nm": "binutils", "python": "need Python 3.10 or 3.11"}[lacking] in said
    assert not list(tmp_path.iterdir())


def test_make_and_continuous_integration_run_both_lanes() -> None:
    makefile, script = (ROOT / name for name in ("Makefile", ".ci/run"))
    for target, command in (("test-npu", "lane.py npu"), ("test-cuda-compile", "lane.py cuda")):
        (body,) = (part.split("\n\n")[0] for part in makefile.read_text().split(f"\n{target}:")[1:])
        assert command in body
        assert "|| true" not in body
        assert "-@" not in body
        assert f"make {target}" in script.read_text().splitlines()
    assert "set -euo pipefail" in script.read_text()
