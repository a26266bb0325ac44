"""Lowers every Triton specimen for Ascend 910B as far as Linalg, by the pass pipeline that triton-ascend brings.

Runs where triton-ascend owns the name `triton` (make test-kernels makes .venv-ascend for it), no Ascend device needed:

    TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=src .venv-ascend/bin/python tests/fusion/ascend_lower.py OUT.json

Writes {specimen: {"linalg_lines": n, "row_copies": n, "error": message or null}}: a specimen that this pipeline refuses
cannot run on Ascend. A `memref.copy` moves a whole row; what moves element by element would be slow there.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

# ruff: noqa: TID253 - this script runs in the environment of triton-ascend alone
from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_specimens import Specimen, specimens

# What triton-ascend 3.2 runs between Triton IR and Linalg, before CANN's own compiler.
UNSTRUCTURED = "compile-on-910-95=False force-simt-template=False"
LINALG = "global-kernel=false named-ops=False enable-nd2nz-on-vector=False enable-select-analysis=True compile-on-910-95=False"
PIPELINE = (
    f"--discrete-mask-access-conversion={UNSTRUCTURED}",
    "--triton-to-annotation",
    f"--triton-to-unstructure={UNSTRUCTURED}",
    "--triton-to-hivm",
    "--triton-to-hfusion",
    "--triton-to-llvm",
    "--bubble-up-operation",
    f"--triton-to-linalg={LINALG}",
)
TARGET = GPUTarget("npu", "Ascend910B3", 0)


def lower(specimen: Specimen) -> str:
    """Linalg IR of a specimen; raises CalledProcessError with the adapter's message where it is refused."""
    backend = ascend.AscendBackend(TARGET)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=specimen.kernel, signature=specimen.signature, constants=specimen.constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    triton_ir = str(ascend.make_ttir(module, {**options.__dict__}, options))
    adapter = Path(ascend.__file__).parent / "triton-adapter-opt"
    adapter.chmod(0o755)
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "kernel.ttir.mlir"), Path(folder, "kernel.linalg.mlir")
        before.write_text(triton_ir)
        subprocess.run([adapter, before, *PIPELINE, "-o", after], check=True, capture_output=True, text=True)
        return after.read_text()


def report() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for specimen in specimens("npu"):
        try:
            linalg = lower(specimen)
        except subprocess.CalledProcessError as error:
            found[specimen.name] = {"error": error.stderr[-2000:]}
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is this specimen's result
            found[specimen.name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            found[specimen.name] = {"error": None, "linalg_lines": len(linalg.splitlines()), "row_copies": linalg.count("memref.copy")}
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(report(), indent=1))
