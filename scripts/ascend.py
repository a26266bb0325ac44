"""Make `.venv-ascend`, where the Triton kernels are lowered for Ascend without an Ascend device: `python3 scripts/ascend.py`.

An environment of its own, because triton-ascend owns the import name of triton, and because it has no wheel for
Python 3.12. Uses the standard library alone. A second call does nothing unless this file changed.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-ascend"
STAMP = VENV / "ninerank-setup.txt"
CANDIDATES = ("python3.11", "python3.10", sys.executable, "python3")
PYTHONS = ("3.11", "3.10")
# triton-ascend names no dependencies that would do here: its compiler alone is used, no CANN and no torch_npu.
TRITON_ASCEND = "triton-ascend==3.2.0"
BESIDE = ("torch==2.13.0", "numpy>=2.0", "pyyaml", "pybind11", "pydantic>=2.9", "typing_extensions>=4.12")
# torch loads whatever backends are installed; none is wanted here.
PROBE = "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'; import torch; from triton.backends.ascend import compiler"


def main() -> int:
    """Make the environment, or say in one line why not; returns the exit code."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == digest and _runs(VENV / "bin" / "python", PROBE):
        return 0
    base = next((name for name in CANDIDATES if _version(name) in PYTHONS), None)
    if base is None:
        print(f"error: triton-ascend needs Python 3.10 or 3.11; none of {', '.join(CANDIDATES)} is one", file=sys.stderr)
        return 1
    print(f"making {VENV} with {base}", flush=True)
    python = str(VENV / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    for command in ((base, "-m", "venv", "--clear", str(VENV)), (*pip, *BESIDE), (*pip, "--no-deps", TRITON_ASCEND), (python, "-c", PROBE)):
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            print(f"error: {' '.join(command)} failed; its message is above", file=sys.stderr)
            return 1
    STAMP.write_text(digest, encoding="utf-8")
    return 0


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
