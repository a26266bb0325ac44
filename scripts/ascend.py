"""Make `.venv-ascend`, where Ascend is tried without an Ascend device: `python3 scripts/ascend.py`.

It holds torch for the CPU, torch_npu, triton-ascend and Ninerank itself. An environment of its own, because triton-ascend owns the import
name of triton, because with torch_npu and no CANN a plain `import torch` fails, and because neither has a wheel for Python 3.12.
Uses the standard library alone; where wheels come from is for pip's own settings to say. A second call does nothing unless this file or
the dependencies in pyproject.toml changed. About 1.7 GB, of which 350 MB are fetched.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-ascend"
STAMP = VENV / "ninerank-setup.txt"
CANDIDATES = ("python3.11", "python3.10", sys.executable, "python3")
PYTHONS = ("3.11", "3.10")
TORCH = "2.13.0"
# For the stand-in of the driver (tests/devices/standin.py): a C compiler and nm.
PROGRAMS = {"gcc": "gcc", "g++": "g++", "nm": "binutils"}
# triton-ascend names dependencies that would not do here: its compiler alone is used.
TRITON_ASCEND = "triton-ascend==3.2.0"
BESIDE = (f"torch_npu=={TORCH}", "pyyaml", "pybind11", "setuptools>=77.0.3")
# torch loads whatever backends are installed; torch_npu cannot be loaded without its driver.
PROBE = """
import os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import importlib.util, torch, ninerank
from triton.backends.ascend import compiler
assert importlib.util.find_spec("torch_npu")
"""


def main() -> int:
    """Make the environment, or say in one line why not; returns the exit code."""
    lacking = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if lacking:
        print(f"error: {' and '.join(lacking)} needed for Ascend's stand-in: apt-get install {' '.join(lacking)}", file=sys.stderr)
        return 1
    needed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("]")[0]
    digest = hashlib.sha256(Path(__file__).read_bytes() + needed.encode()).hexdigest()
    python = VENV / "bin" / "python"
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == digest and _runs(python, PROBE):
        return 0
    base = next((name for name in CANDIDATES if _version(name) in PYTHONS), None)
    if base is None:
        print(f"error: torch_npu and triton-ascend need Python 3.10 or 3.11; none of {', '.join(CANDIDATES)} is one", file=sys.stderr)
        return 1
    print(f"making {VENV} with {base}", flush=True)
    start_s = time.monotonic()
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    if subprocess.run((base, "-m", "venv", "--clear", str(VENV)), cwd=ROOT, check=False).returncode != 0:
        print(f"error: {base} cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv", file=sys.stderr)
        return 1
    # The build for the CPU where the indexes have it, and named again later, so that nothing swaps it.
    torch = f"torch=={TORCH}+cpu"
    if not _can_install(python, torch):
        torch = f"torch=={TORCH}"
    for command in (
        (*pip, torch, *BESIDE),
        (*pip, "--no-deps", TRITON_ASCEND),
        (*pip, "--no-build-isolation", torch, "-e", str(ROOT)),
        (str(python), "-c", PROBE),
    ):
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            print(f"error: {' '.join(command)} failed; its message is above", file=sys.stderr)
            return 1
    STAMP.write_text(digest, encoding="utf-8")
    print(f"ready after {time.monotonic() - start_s:.0f} s", flush=True)
    return 0


def _can_install(python: Path, requirement: str) -> bool:
    """Whether pip's indexes have a wheel of it."""
    arguments = ["-m", "pip", "install", "--dry-run", "--no-deps", "--only-binary=:all:", "--quiet", requirement]
    return subprocess.run([str(python), *arguments], cwd=ROOT, capture_output=True, check=False).returncode == 0


def _version(name: str) -> str | None:
    """3.11, or None where the command does not run (a pyenv shim of a version that is not active exists and fails)."""
    try:
        code = "import sys; print('{}.{}'.format(*sys.version_info[:2]))"
        return subprocess.run([name, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _runs(python: Path, code: str) -> bool:
    return python.exists() and subprocess.run([str(python), "-c", code], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
