"""One Triton source for CUDA and Ascend: right in the interpreter, compiled for both without a device, right on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ASCEND_PYTHON = ROOT / ".venv-ascend" / "bin" / "python"
FEWEST_SPECIMENS = 30

triton = pytest.importorskip("triton", reason="triton has wheels for Linux alone")


def _run_parity(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_parity.py")]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def _specimens() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_specimens", HERE / "triton_specimens.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_specimens"] = module
    spec.loader.exec_module(module)
    return module


def test_parity_in_the_interpreter() -> None:
    done = _run_parity(TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.gpu
def test_parity_on_a_gpu() -> None:
    done = _run_parity(NINERANK_TRITON_DEVICE="cuda", TRITON_DEFAULT_FP_FUSION="1")
    assert done.returncode == 0, done.stdout[-4000:]


def _compile(capability: int, part: str = "") -> int:
    """Compile the specimens whose name has `part` in it; returns how many."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chosen = [specimen for specimen in _specimens().specimens("cuda") if part in specimen.name]
    for specimen in chosen:
        constants = {(specimen.kernel.arg_names.index(name),): value for name, value in specimen.constants.items()}
        signature = {name: specimen.signature.get(name, "constexpr") for name in specimen.kernel.arg_names}
        source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
        assert compiled.asm["cubin"][:4] == b"\x7fELF", specimen.name
        assert "atom" not in compiled.asm["ptx"], f"{specimen.name} uses atomics: its result would depend on timing"
    return len(chosen)


def test_usual_forms_compile_to_a_cubin() -> None:
    assert _compile(90, "-fp32-16") > 10


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_form_compiles_to_a_cubin(capability: int) -> None:
    assert _compile(capability) >= FEWEST_SPECIMENS


@pytest.mark.slow
def test_lowers_for_ascend(tmp_path: Path) -> None:
    if not ASCEND_PYTHON.exists():
        pytest.fail(f"{ASCEND_PYTHON} is missing: `make test-kernels` makes the environment with triton-ascend")
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [ASCEND_PYTHON, HERE / "ascend_lower.py", tmp_path / "report.json"], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) >= FEWEST_SPECIMENS
    refused = {name: found["error"] for name, found in report.items() if found["error"] is not None}
    assert not refused
    by_element = [name for name, found in report.items() if found["row_copies"] == 0]
    assert not by_element, "rows would be moved element by element"
