"""Every Triton kernel through its device's compiler: all specimens, and exactly the launches that traced steps made."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from launches import Launch

sys.path.append(str(Path(__file__).resolve().parents[1] / "fusion"))

from triton_specimens import Specimen, specimens

__all__ = ["all_kernels", "cubin", "unseen_kernels"]

SOURCES = Path(__file__).resolve().parents[2] / "src" / "ninerank" / "fusion" / "kernels"


def all_kernels(device_type: str, launches: Iterable[Launch]) -> Iterator[Specimen]:
    """Specimens, then launches under the name of their kernel and a number."""
    yield from specimens(device_type)
    for number, launch in enumerate(launches, 1):
        yield Specimen(f"launched-{launch.name}-{number}", launch.kernel, dict(launch.signature), dict(launch.constants))


def unseen_kernels(device_type: str) -> list[str]:
    """Kernels (by the convention that what is launched is named so) that have no specimen: nobody would notice that they do not compile."""
    tried = {specimen.kernel.fn.__name__ for specimen in specimens(device_type)}
    written = set()
    for source in SOURCES.glob("*/triton.py"):
        for line in source.read_text(encoding="utf-8").splitlines():
            if line.startswith("def ") and line.partition("(")[0].endswith("_kernel"):
                written.add(line.removeprefix("def ").partition("(")[0])
    return sorted(written - tried)


def cubin(specimen: Specimen, capability: int) -> str:
    """Compile for an NVIDIA GPU; returns what was seen, raises where it cannot be, or would depend on timing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {(specimen.kernel.arg_names.index(name),): value for name, value in specimen.constants.items()}
    signature = {name: specimen.signature.get(name, "constexpr") for name in specimen.kernel.arg_names}
    source = ASTSource(fn=specimen.kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert compiled.asm["cubin"][:4] == b"\x7fELF", "no cubin"
    assert "atom" not in compiled.asm["ptx"], "uses atomics: its result would depend on timing"
    return f"{len(compiled.asm['cubin']) >> 10} KiB"
