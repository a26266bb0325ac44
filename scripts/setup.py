"""Make `.venv` and install Ninerank with wheels that belong together: `python3 scripts/setup.py --device cpu|cuda|npu --for demo|run|test`.

Uses the standard library alone, since nothing is installed yet; `make setup`, `make demo` and `make test` call it. A second
call does nothing unless pyproject.toml or this file changed, or more is asked for than was installed.

torch 2.13, torchrec 1.8, fbgemm 1.8 and torch_npu 2.13 belong together: another mix fails when it loads, or later. torchrec is
installed without its dependencies, because they name the CUDA build of fbgemm on every machine; the extras bring the others.
Where wheels come from is decided by pip's own settings (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS, ...) and nothing else.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH, TORCH_NPU, TORCHREC, FBGEMM = "2.13.0", "2.13.0", "1.8.0", "1.8.0"
PYTHONS = ((3, 10), (3, 11), (3, 12))
# 3.11 first: it has wheels of everything, those for Ascend included.
CANDIDATES = ("python3.11", "python3.12", "python3.10", "python3", "python")
LEVELS = {"demo": ("serve", "report"), "run": ("serve", "report", "DEVICE"), "test": ("serve", "report", "DEVICE", "dev")}
CPU_WHEELS = """\
    This pip finds no CPU-only build of torch {torch} for Python {python}; on Linux the plain one may bring 2-3 GB of CUDA packages.
    To get the CPU build: point pip at PyTorch's index of CPU wheels (its installation page names it: compute platform CPU),
    for example with PIP_EXTRA_INDEX_URL, or take another interpreter: make setup PYTHON=python3.11"""


class SetupError(Exception):
    """Something on this machine keeps the setup from going on; the message says what to do."""


def main(arguments: "list[str] | None" = None) -> int:
    """Set up, or say in one line why not; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make .venv and install Ninerank with wheels that belong together.")
    parser.add_argument("--device", default="", help="cpu, cuda or npu (default: what this machine has)")
    parser.add_argument(
        "--for", dest="level", choices=LEVELS, default="run", help="demo: the least; run: all but developers' tools; test: all"
    )
    parser.add_argument("--python", default="", help="interpreter to make the environment with (3.10, 3.11 or 3.12)")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is or will be")
    options = parser.parse_args(arguments)
    try:
        set_up(options.venv.absolute(), options.device, options.level, options.python)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def set_up(venv: Path, device: str, level: str, python: str) -> None:
    """Bring `venv` to `level`; keeps the device it was made for unless another is named."""
    stamp_file = venv / "ninerank-setup.json"
    stamp = read_stamp(stamp_file)
    device = check_device(device) or stamp.get("device") or detect_device()
    extras = sorted(device if extra == "DEVICE" else extra for extra in LEVELS[level] + (("DEVICE",) if device == "npu" else ()))
    same = stamp.get("inputs") == inputs_digest() and stamp.get("device") == device and set(extras) <= set(stamp.get("extras", []))
    if same and (venv / "bin" / "python").exists():  # not so where the Python it was made with was removed since
        if python:
            make_venv(venv, python)  # says so if it is another one
        return
    if stamp.get("device", device) != device:
        raise SetupError(f"{venv} was made for {stamp['device']}, {device} is asked for: remove it first (rm -rf {venv})")
    extras = sorted({*extras, *stamp.get("extras", [])})

    start_s = time.monotonic()
    interpreter = make_venv(venv, python)
    version = show(python_version([str(interpreter)]))
    say(f"device {device}, Python {version}, extras {' '.join(extras)}")
    stamp_file.unlink(missing_ok=True)
    install(interpreter, device, extras, version)
    stamp_file.write_text(json.dumps({"inputs": inputs_digest(), "device": device, "extras": extras}), encoding="utf-8")
    say(f"ready after {time.monotonic() - start_s:.0f} s: {venv}/bin/ninerank doctor shows what is there")


def install(interpreter: Path, device: str, extras: "list[str]", version: str) -> None:
    """The steps in order; torch first and then held fast, so that no later step swaps its build."""
    pip = Pip(interpreter, steps=3 if any(extra in extras for extra in ("cpu", "npu")) else 2)
    if device == "cuda":
        torch = f"torch=={TORCH}"
    else:
        torch = f"torch=={TORCH}+cpu"
        if not pip.can_install(torch):
            torch = f"torch=={TORCH}"
            if sys.platform == "linux":
                print(CPU_WHEELS.format(torch=TORCH, python=version), flush=True)
    pip.run(f"torch {TORCH}", "install", torch, "setuptools>=77.0.3")
    held = [f"torch=={pip.installed('torch')}", f"fbgemm-gpu=={FBGEMM}", f"fbgemm-gpu-cpu=={FBGEMM}", f"torch_npu=={TORCH_NPU}"]
    held.append(f"torchrec=={TORCHREC}")
    constraints = interpreter.parent.parent / "constraints.txt"
    constraints.write_text("\n".join(held) + "\n", encoding="utf-8")
    pip.run("ninerank and what it needs", "install", "-c", str(constraints), "--no-build-isolation", "-e", f"{ROOT}[{','.join(extras)}]")
    if pip.steps == 3:
        pip.run(f"torchrec {TORCHREC}", "install", "--no-deps", f"torchrec=={TORCHREC}")


class Pip:
    """pip of one environment, each call announced as a step; quiet unless a person watches."""

    def __init__(self, interpreter: Path, steps: int) -> None:
        self.command = [str(interpreter), "-m", "pip"]
        self.steps = steps
        self.step = 0

    def run(self, what: str, *arguments: str) -> None:
        """One step; raises SetupError where pip fails, whose own message stands above."""
        self.step += 1
        say(f"[{self.step}/{self.steps}] {what}")
        quiet = [] if sys.stdout.isatty() else ["--quiet"]
        command = [*self.command, *arguments, "--disable-pip-version-check", *quiet]
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            raise SetupError(f"step {self.step} failed: {what}. pip's message is above; once it is mended, run the same command again")

    def can_install(self, requirement: str) -> bool:
        """Whether pip's indexes have a wheel of `requirement` for this interpreter; downloads at most its metadata."""
        arguments = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:", "--quiet", requirement]
        outcome = subprocess.run([*self.command, *arguments], cwd=ROOT, capture_output=True, check=False)
        return outcome.returncode == 0

    def installed(self, name: str) -> str:
        """Version of an installed distribution."""
        code = f"from importlib.metadata import version; print(version({name!r}))"
        return subprocess.run([self.command[0], "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def make_venv(venv: Path, python: str) -> Path:
    """Interpreter of the environment, which is made if it is not there or its Python is gone."""
    interpreter = venv / "bin" / "python"
    have = python_version([str(interpreter)]) if interpreter.exists() else None
    if have in PYTHONS:
        wanted = python_version([python]) if python else have
        if wanted != have:
            raise SetupError(f"{venv} has Python {show(have)}, PYTHON={python} is {show(wanted)}: remove it first (rm -rf {venv})")
        return interpreter
    base = find_python(python)
    say(f"making {venv} with {base}")
    outcome = subprocess.run([base, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        hint = "on Debian and Ubuntu: apt-get install python3-venv"
        raise SetupError(f"{base} cannot make an environment ({hint}):\n{outcome.stdout}{outcome.stderr}".rstrip())
    return interpreter


def find_python(python: str) -> str:
    """First interpreter that is new enough and not too new; `python` alone where it is named."""
    seen = {}
    for name in (python,) if python else CANDIDATES:
        seen[name] = python_version([name])
        if seen[name] in PYTHONS:
            return name
    found = ", ".join(f"{name} is {show(version)}" for name, version in seen.items() if version) or "none found"
    raise SetupError(f"Python 3.10, 3.11 or 3.12 is needed ({found}); install one, or name it: make setup PYTHON=/path/to/python3.11")


def python_version(command: "list[str]") -> "tuple[int, int] | None":
    """(3, 11), or None where the command does not run (a pyenv shim of a version that is not active exists and fails)."""
    try:
        code = "import sys; print(*sys.version_info[:2])"
        outcome = subprocess.run([*command, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        major, minor = outcome.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def show(version: "tuple[int, int] | None") -> str:
    """3.11, or a word for a command that does not run."""
    return "{}.{}".format(*version) if version else "no Python that runs"


def check_device(device: str) -> str:
    """`device` as it is; raises SetupError for a name that is none."""
    if device not in {"", "cpu", "cuda", "npu"}:
        raise SetupError(f"DEVICE={device}: is none of cpu, cuda, npu")
    return device


def detect_device() -> str:
    """npu or cuda where its driver's tool runs, else cpu."""
    for device, command in (("npu", ["npu-smi", "info"]), ("cuda", ["nvidia-smi", "-L"])):
        try:
            if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0:
                return device
        except (OSError, subprocess.TimeoutExpired):
            continue
    return "cpu"


def inputs_digest() -> str:
    """SHA-256 of what decides about the installation."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__).resolve()):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())
    return digest.hexdigest()


def read_stamp(path: Path) -> "dict[str, Any]":
    """What the last complete setup left, or nothing."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def say(text: str) -> None:
    """One line of progress."""
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main())
