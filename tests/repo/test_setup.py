"""`scripts/setup.py` with a pip that only writes down what it was asked; its versions against the package's bounds."""

import json
import os
import stat
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/bin/sh
# Stands in for the interpreter of an environment: the real one answers, pip is written down.
if [ "$2" = pip ]; then
    echo "$@" >> {log}
    case "$*" in *{refused}*) exit 1;; esac
    exit 0
fi
case "$*" in *importlib.metadata*) echo 2.13.0+cpu; exit 0;; esac
exec {python} "$@"
"""


def load(name: str) -> ModuleType:
    spec = util.spec_from_file_location(f"ninerank_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load("setup")


class Environment:
    """An environment whose pip does nothing; `calls` are pip's command lines since they were last asked for."""

    def __init__(self, folder: Path, refused: str = "no-such-thing") -> None:
        self.venv = folder / "venv"
        self.log = folder / "pip.log"
        interpreter = self.venv / "bin" / "python"
        interpreter.parent.mkdir(parents=True)
        interpreter.write_text(PYTHON.format(log=self.log, refused=refused, python=sys.executable))
        interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.replace(" --disable-pip-version-check", "").replace(" --quiet", "") for line in lines if "--dry-run" not in line]

    def set_up(self, *words: str) -> int:
        return int(setup.main(["--venv", str(self.venv), *words]))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_cpu_takes_the_cpu_build_and_torchrec_without_its_cuda_dependency(environment: Environment) -> None:
    assert environment.set_up("--device", "cpu", "--for", "test") == 0
    torch, ninerank, torchrec = environment.calls()
    assert "install torch==2.13.0+cpu " in torch
    assert ninerank.endswith("[cpu,dev,report,serve]")
    assert "-c " in ninerank
    assert torchrec.endswith("install --no-deps torchrec==1.8.0")
    held = (environment.venv / "constraints.txt").read_text().split()
    assert {"torch==2.13.0+cpu", "fbgemm-gpu-cpu==1.8.0", "torch_npu==2.13.0"} <= set(held)


def test_without_a_cpu_build_the_plain_one_is_taken_and_the_person_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment(tmp_path, refused="+cpu")
    assert environment.set_up("--device", "cpu") == 0
    assert "install torch==2.13.0 " in environment.calls()[0]
    if sys.platform == "linux":
        assert "PIP_EXTRA_INDEX_URL" in capsys.readouterr().out


def test_the_demo_installs_the_least(environment: Environment) -> None:
    assert environment.set_up("--device", "cpu", "--for", "demo") == 0
    calls = environment.calls()
    assert len(calls) == 2
    assert calls[1].endswith("[report,serve]")


def test_cuda_takes_torchrec_from_the_extra(environment: Environment) -> None:
    assert environment.set_up("--device", "cuda") == 0
    torch, ninerank = environment.calls()
    assert "install torch==2.13.0 " in torch
    assert ninerank.endswith("[cuda,report,serve]")


@pytest.mark.parametrize("level", ["demo", "run"])
def test_npu_always_takes_torch_npu(environment: Environment, level: str) -> None:
    assert environment.set_up("--device", "npu", "--for", level) == 0
    _, ninerank, torchrec = environment.calls()
    assert ninerank.endswith("[npu,report,serve]")
    assert "torchrec==1.8.0" in torchrec


def test_a_second_call_does_nothing(environment: Environment) -> None:
    for level in ("run", "test"):
        assert environment.set_up("--device", "cpu", "--for", level) == 0
        assert environment.calls()
    for level in ("test", "run", "demo"):
        assert environment.set_up("--for", level) == 0
        assert environment.calls() == []


def test_a_named_python_is_compared_also_when_nothing_is_to_do(environment: Environment, tmp_path: Path) -> None:
    assert environment.set_up("--device", "cpu") == 0
    environment.calls()
    assert environment.set_up("--python", sys.executable) == 0
    assert environment.set_up("--python", fake_python(tmp_path, "other", "echo 3 9")) == 1
    assert environment.calls() == []


def test_an_environment_whose_python_is_gone_is_made_again(
    environment: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment.set_up("--device", "cpu") == 0
    interpreter = environment.venv / "bin" / "python"
    interpreter.unlink()
    interpreter.symlink_to(tmp_path / "gone")
    lame = fake_python(tmp_path, "lame", 'if [ "$1" = -m ]; then exit 1; fi; echo 3 11')
    assert environment.set_up("--python", lame) == 1
    assert f"making {environment.venv} with {lame}" in capsys.readouterr().out


def test_more_is_added_to_what_is_there(environment: Environment) -> None:
    environment.set_up("--device", "cpu", "--for", "test")
    stamp = environment.venv / "ninerank-setup.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "inputs": "of an older pyproject"}))
    environment.calls()
    assert environment.set_up("--for", "demo") == 0
    assert environment.calls()[1].endswith("[cpu,dev,report,serve]")


def test_another_device_needs_another_environment(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    environment.set_up("--device", "cpu")
    environment.calls()
    assert environment.set_up("--device", "cuda") == 1
    assert f"was made for cpu, cuda is asked for: remove it first (rm -rf {environment.venv})" in capsys.readouterr().err
    assert environment.calls() == []


def test_a_step_that_fails_is_named_and_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = Environment(tmp_path, refused="torchrec")
    assert environment.set_up("--device", "cpu") == 1
    assert "error: step 3 failed: torchrec 1.8.0." in capsys.readouterr().err
    assert not (environment.venv / "ninerank-setup.json").exists()
    environment.calls()
    assert environment.set_up("--device", "cpu") == 1
    assert len(environment.calls()) == 3


def test_a_damaged_stamp_counts_as_none(environment: Environment) -> None:
    (environment.venv / "ninerank-setup.json").write_text('{"inputs": ')
    assert environment.set_up("--device", "cpu") == 0
    assert environment.calls()


def test_a_device_that_is_none(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.set_up("--device", "gpu") == 1
    assert "DEVICE=gpu: is none of cpu, cuda, npu" in capsys.readouterr().err


def fake_python(folder: Path, name: str, answer: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_that_is_too_old_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = fake_python(tmp_path, "python3.8", "echo 3 8")
    assert setup.main(["--venv", str(tmp_path / "venv"), "--device", "cpu", "--python", old]) == 1
    assert f"Python 3.10, 3.11 or 3.12 is needed ({old} is 3.8)" in capsys.readouterr().err


def test_the_first_python_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, "python3.11", "echo not active >&2; exit 127")
    fake_python(tmp_path, "python3.12", "echo 3 12")
    fake_python(tmp_path, "python3", "echo 3 13")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.find_python("") == "python3.12"
    (tmp_path / "python3.12").unlink()
    with pytest.raises(setup.SetupError, match=r"needed \(python3 is 3\.13\); install one"):
        setup.find_python("")


def test_another_python_needs_another_environment(environment: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = fake_python(tmp_path, "other", "echo 3 9")
    assert environment.set_up("--device", "cpu", "--python", other) == 1
    assert "is 3.9: remove it first" in capsys.readouterr().err


def test_a_python_that_cannot_make_environments_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lame = fake_python(tmp_path, "lame", 'if [ "$1" = -m ]; then echo ensurepip is not available; exit 1; fi; echo 3 11')
    assert setup.main(["--venv", str(tmp_path / "venv"), "--device", "cpu", "--python", lame]) == 1
    err = capsys.readouterr().err
    assert "apt-get install python3-venv" in err
    assert "ensurepip is not available" in err


@pytest.mark.parametrize(("tools", "device"), [((), "cpu"), (("nvidia-smi",), "cuda"), (("nvidia-smi", "npu-smi"), "npu")])
def test_the_device_is_detected(tools: tuple[str, ...], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in tools:
        fake_python(tmp_path, tool, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.detect_device() == device


def test_a_tool_without_its_driver_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.detect_device() == "cpu"


def test_its_versions_lie_within_the_bounds_of_the_package() -> None:
    from ninerank.cli.environment import requirements

    pins = {
        "torch": setup.TORCH,
        "torch_npu": setup.TORCH_NPU,
        "torchrec": setup.TORCHREC,
        "fbgemm-gpu": setup.FBGEMM,
        "fbgemm-gpu-cpu": setup.FBGEMM,
    }
    found = {item.name: item for extra in ("", "cpu", "cuda", "npu") for item in requirements(extra)}
    for name, version in pins.items():
        assert isinstance(found[name], Requirement)
        assert found[name].specifier.contains(version), f"{name} {version}"
        assert not found[name].specifier.contains("99"), f"{name} needs an upper bound"


def test_it_needs_nothing_but_the_standard_library() -> None:
    outcome = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "scripts" / "setup.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "--device" in outcome.stdout


def test_make_lists_its_targets() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    outcome = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True, env=environment)
    for target in ("setup", "demo", "test", "lint", "docs", "bench"):
        assert f"make {target} " in outcome.stdout


def test_ci_entry_can_be_run() -> None:
    entry = ROOT / ".ci" / "run"
    assert os.access(entry, os.X_OK)
    subprocess.run(["bash", "-n", str(entry)], check=True)
