"""What Inductor makes of a bundle's graph for an NVIDIA GPU, without one: its Triton kernels, compiled to cubins.

`cudagraphs` and `aoti` hand graphs to Inductor, which asks the device what it is before it writes a line. Here it is told: an H100. What it
writes is taken before it would be loaded; products of matrices are calls of cuBLAS there, which nothing here looks at.
"""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from kernels import cubin
from steps import ROWS, served
from torch import Tensor
from triton_specimens import Specimen

from ninerank.fusion.backends import AUTOMATIC, BACKENDS
from ninerank.fusion.backends.npu import tupled
from ninerank.fusion.compile import graph_for_one
from ninerank.predictor.graph import build_graph

__all__ = ["kernels_of"]

CAPABILITY = 90
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100",
    major=CAPABILITY // 10,
    minor=CAPABILITY % 10,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    gcnArchName="",  # asked for wherever a build has no CUDA
)
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)
# Padding is decided by measuring on the device, constants are folded by computing there; nothing is kept for later.
SETTINGS = dict.fromkeys(("shape_padding", "joint_graph_constant_folding", "fx_graph_cache", "cpp_wrapper"), False)


class _WrittenError(Exception):
    """Inductor has written its code."""


def kernels_of(name: str) -> str:
    """Have Inductor write code for the graph of a model, as compiled for one request, and compile its kernels; returns what was seen."""
    own, device = served(name), torch.device("cuda", 0)
    sides = own.sides(ROWS, 1)
    code = _written(own, sides, device)
    found = KERNEL.findall(code)
    assert found, "Inductor wrote no kernel"
    sizes = [cubin(_specimen(kernel, source), CAPABILITY) for kernel, source in found]
    return f"{len(found)} kernels to sm_{CAPABILITY}: {', '.join(sizes)}; {code.count('extern_kernels.')} calls of libraries"


def _written(own: Any, sides: dict[str, Tensor], device: torch.device) -> str:
    """The Python that Inductor writes."""
    from torch._inductor import compile_fx, config, graph
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    codes: list[str] = []

    def take(lowering: Any, *_: Any, **__: Any) -> None:
        code, _ = lowering.codegen()
        codes.append(getattr(code, "value", code))
        raise _WrittenError

    with (
        _told(device),
        config.patch({**SETTINGS, "compile_threads": 1}),
        mock.patch.object(graph.GraphLowering, "_compile_to_module", take),
        torch.no_grad(),
    ):
        with FakeTensorMode(shape_env=ShapeEnv()) as fake:
            weights = {key: fake.from_tensor(value, static_shapes=True) for key, value in own.graphs[1].weights.items()}
            many = build_graph(replace(own.graphs[1], weights=weights), device)
            one = BACKENDS[AUTOMATIC["cuda"]].prepare(graph_for_one(many, own.records), "fp32", True)
            given = [fake.from_tensor(sides[key], static_shapes=True).to(device) for key in own.names]
        try:
            compile_fx.compile_fx(tupled(one), given)
        except Exception:
            if not codes:
                raise
    return codes[0]


@contextmanager
def _told(device: torch.device) -> Iterator[None]:
    """Answers to what Inductor asks of a device, and of the driver of Triton."""
    import torch._inductor.scheduler
    import triton
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
        get_current_device=lambda: device.index,
        get_active_torch_device=lambda: device,
    )
    answers: dict[str, Any] = {
        "_get_device_properties": PROPERTIES,
        "get_device_properties": PROPERTIES,
        "current_device": device.index,
        "device_count": 1,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, create=True, return_value=answer))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0))
        stack.enter_context(mock.patch.object(torch._inductor.scheduler, "has_triton", return_value=True))
        for name in ("_active", "_default"):
            stack.enter_context(mock.patch.object(triton.runtime.driver, name, target, create=True))
        yield


def _specimen(name: str, source: str) -> Specimen:
    """A kernel as Inductor wrote it, in the first form in which it would be tried."""
    from torch._inductor.runtime import triton_helpers

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(triton_helpers, "set_driver_to_gpu"):
        file = Path(folder, f"{name}.py")
        file.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
        tuned = getattr(module, name)
        signature = {key: kind for key, kind in tuned.triton_meta["signature"].items() if kind != "constexpr"}
        chosen = tuned.configs[0].kwargs
        constants = {key: chosen.get(key) for key, kind in tuned.triton_meta["signature"].items() if kind == "constexpr"}
        return Specimen(name, tuned.fn, signature, {**tuned.triton_meta["constants"], **constants})
