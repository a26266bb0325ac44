"""What runs a compiled ranking graph, by name.

    script      TorchScript with oneDNN's packed linear layers; no Python while it runs, ready in under a second     cpu
    openvino    OpenVINO (extra `openvino`); seconds to convert, then threads of its own; fp32 and bf16                  cpu
    inductor    torch.compile; the first call of each kind of shape takes seconds                                    cpu, cuda
    aoti        AOTInductor; compiled once in a minute, then loaded from disk                                        cpu, cuda
    cudagraphs  the same, recorded as one CUDA graph for each of a few shapes                                        cuda
    npugraphs   npugraph_ex, torch_npu's graph mode: operators fused and recorded, for each of a few shapes          npu
    eager       operator by operator from Python: the last resort                                                    everywhere

`auto` takes script, cudagraphs and npugraphs, by device, and eager where that fails; the log says which, and why. Precision `bf16` runs
hidden layers in bfloat16 where the device multiplies it; whoever asks for it holds the scores to a budget.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx

from ninerank.errors import BundleError, DeviceError, nearest
from ninerank.fusion.backends import aoti, npu, vino
from ninerank.fusion.backends.buckets import Bucketed
from ninerank.fusion.backends.copies import own_copy
from ninerank.fusion.backends.gates import fuse_gates
from ninerank.fusion.backends.onednn import has_packed_linear, pack_linears, rounded_inputs
from ninerank.fusion.backends.recorded import Recorded
from ninerank.fusion.backends.script import script
from ninerank.fusion.capture import GraphInput, inputs_of

__all__ = ["AUTO", "BACKENDS", "Backend", "Precision", "Runner", "lower", "multiplies_bf16"]

log = logging.getLogger(__name__)

AUTO = "auto"
Precision = Literal["fp32", "bf16"]
Run = Callable[..., Tensor]


class Runner:
    """A graph bound to a device: takes `inputs`, in their order, and returns logits_BT (float32).

    One request takes a graph of its own where there is one (`fusion.single`): what is the same for all candidates is broadcast.
    graph, graph_one: what runs, for looking at it operator by operator; their nodes say what they stand for (`backends.copies`).
    dtypes: inputs that both graphs round before anything else, and may be given in the type they are rounded to.
    """

    def __init__(
        self,
        backend: str,
        precision: Precision,
        inputs: Sequence[GraphInput],
        runs: tuple[Run, Run],
        graphs: tuple[fx.GraphModule, fx.GraphModule],
    ) -> None:
        self.backend, self.precision, self.inputs = backend, precision, tuple(inputs)
        self.graph, self.graph_one = graphs
        self.dtypes = rounded_inputs(graphs)
        self._run, self._run_one = runs
        self._request_input = next((place for place, given in enumerate(inputs) if given.role == "request"), None)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return (self._run_one if self.is_one(inputs) else self._run)(*inputs)

    def is_one(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these are one request's, so that the graph for one runs."""
        return self._request_input is not None and inputs[self._request_input].shape[0] == 1


@dataclass(frozen=True)
class Backend:
    """What runs graphs on a kind of device.

    prepare: the graph as this backend wants it, a copy, for a precision and for one request or many. bind: what runs it on a device, for
    one request or many.
    device_types: where it runs, empty for everywhere. precisions: what it runs in. require: raises DeviceError where a package is missing.
    """

    bind: Callable[[fx.GraphModule, torch.device, bool], Run]
    prepare: Callable[[fx.GraphModule, Precision, bool], fx.GraphModule]
    device_types: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ("fp32",)
    require: Callable[[], object] | None = None

    def obstacle(self, device_type: str) -> str | None:
        """Why it cannot run on `device_type`; None where it can."""
        return f"runs on {', '.join(self.device_types)}" if self.device_types and device_type not in self.device_types else None


def lower(
    module: fx.GraphModule,
    device: torch.device,
    *,
    one: fx.GraphModule | None = None,
    backend: str = AUTO,
    precision: Precision = "fp32",
) -> Runner:
    """Bind a captured graph whose weights lie on `device`; the module itself stays as it is.

    one: the graph for a single request (`fusion.compile.graph_for_one`). A graph that the automatic choice cannot take is run by the
    last resort, which the log says. Raises DeviceError for a backend that is unknown or does not run here, and for bf16 where the
    device does not multiply it; BundleError for a graph that a backend asked for by name cannot take.
    """
    if backend != AUTO and backend not in BACKENDS:
        raise DeviceError(f"unknown backend {backend!r}; {nearest(backend, [AUTO, *BACKENDS])}")
    name = backend if backend != AUTO else AUTOMATIC.get(device.type, "eager")
    obstacle = BACKENDS[name].obstacle(device.type)
    if obstacle is not None:
        there = [other for other, own in BACKENDS.items() if own.obstacle(device.type) is None]
        raise DeviceError(f"backend {name!r} {obstacle}, not on {device.type}; {nearest(backend, there)}")
    if precision not in BACKENDS[name].precisions or (precision == "bf16" and not multiplies_bf16()):
        there = [other for other, own in BACKENDS.items() if precision in own.precisions]
        raise DeviceError(
            f"precision {precision!r} needs backend {' or '.join(map(repr, there))} on a CPU with AMX or AVX512-bf16; "
            f"here it is {name!r} on {device.type}"
        )
    require = BACKENDS[name].require
    if require is not None:
        require()
    if backend == AUTO:
        log.info("graph runs by %s, precision %s", name, precision)
    try:
        graph, run = _bound(BACKENDS[name], module, device, precision, False)
        graph_one, run_one = (graph, run) if one is None or one is module else _bound(BACKENDS[name], one, device, precision, True)
    except Exception as error:
        if backend != AUTO or precision != "fp32" or name == "eager":
            raise
        why = str(error) if isinstance(error, BundleError) else f"{type(error).__name__}: {error}"
        log.warning("backend %s cannot take this graph (%s): it runs operator by operator, which is slower", name, why)
        return lower(module, device, one=one, backend="eager")
    return Runner(name, precision, inputs_of(module), (run, run_one), (graph, graph_one))


def _bound(
    backend: Backend, module: fx.GraphModule, device: torch.device, precision: Precision, one_request: bool
) -> tuple[fx.GraphModule, Run]:
    graph = backend.prepare(module, precision, one_request)
    return graph, backend.bind(graph, device, one_request)


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 (AMX or AVX512-bf16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _eager(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    return module


def _inductor(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor imports what torch itself calls deprecated
        run: Run = torch.compile(module, dynamic=True)
    return run


def _script(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    return script(module)


def _for_openvino(module: fx.GraphModule, precision: Precision, one_request: bool) -> fx.GraphModule:
    return vino.prepare(module, precision)


def _openvino(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    return vino.compiled(module, one_request=one_request)


def _aoti(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    return aoti.compiled(module, device, one_request=one_request)


def _cuda_graphs(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    run = _aoti(module, device, one_request)
    return Bucketed(inputs_of(module), partial(Recorded, run), run)


def _npu_graphs(module: fx.GraphModule, device: torch.device, one_request: bool) -> Run:
    return Bucketed(inputs_of(module), partial(npu.record, module), module)


def _as_it_is(module: fx.GraphModule, precision: Precision, one_request: bool) -> fx.GraphModule:
    return own_copy(module)


def _fused_for_npu(module: fx.GraphModule, precision: Precision, one_request: bool) -> fx.GraphModule:
    return npu.prepare(module)


def _packed(module: fx.GraphModule, precision: Precision, one_request: bool) -> fx.GraphModule:
    module = own_copy(module)
    fuse_gates(module)
    if has_packed_linear():
        pack_linears(module, bf16=precision == "bf16", one_request=one_request)
    return module


BACKENDS = {
    "script": Backend(_script, _packed, ("cpu",), ("fp32", "bf16") if has_packed_linear() else ("fp32",)),
    "openvino": Backend(_openvino, _for_openvino, ("cpu",), ("fp32", "bf16"), vino.require),
    "inductor": Backend(_inductor, _as_it_is, ("cpu", "cuda")),
    "aoti": Backend(_aoti, _as_it_is, ("cpu", "cuda")),
    "cudagraphs": Backend(_cuda_graphs, _as_it_is, ("cuda",)),
    "npugraphs": Backend(_npu_graphs, _fused_for_npu, ("npu",)),
    "eager": Backend(_eager, _as_it_is),
}
# What `auto` takes, by kind of device.
AUTOMATIC = {"cpu": "script", "cuda": "cudagraphs", "npu": "npugraphs"}
