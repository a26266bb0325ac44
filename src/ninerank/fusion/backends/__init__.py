"""What runs a compiled ranking graph, by name.

    script     TorchScript with oneDNN's packed linear layers; no Python while it runs, ready in under a second   cpu
    inductor   torch.compile; the first call of each kind of shape takes seconds                                  cpu, cuda
    eager      operator by operator from Python: the last resort                                                  everywhere

`auto` takes script on the CPU and eager elsewhere, and says which in the log. Precision `bf16` runs hidden layers in bfloat16 where the
device multiplies it; whoever asks for it holds the scores to a budget.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from ninerank.errors import BundleError, DeviceError, nearest
from ninerank.fusion.backends.gates import fuse_gates
from ninerank.fusion.backends.onednn import has_packed_linear, pack_linears
from ninerank.fusion.backends.script import script
from ninerank.fusion.capture import GraphInput, inputs_of

__all__ = ["AUTO", "BACKENDS", "Precision", "Runner", "lower", "multiplies_bf16"]

log = logging.getLogger(__name__)

AUTO = "auto"
Precision = Literal["fp32", "bf16"]
Run = Callable[..., Tensor]


class Runner:
    """A graph bound to a device: takes `inputs`, in their order, and returns logits_BT (float32).

    One request takes a graph of its own where there is one (`fusion.single`): what is the same for all candidates is broadcast.
    """

    def __init__(
        self,
        backend: str,
        precision: Precision,
        inputs: Sequence[GraphInput],
        run: Run,
        run_one: Run,
        request_input: int,
    ) -> None:
        self.backend, self.precision, self.inputs = backend, precision, tuple(inputs)
        self._run, self._run_one, self._request_input = run, run_one, request_input

    def __call__(self, *inputs: Tensor) -> Tensor:
        return (self._run_one if inputs[self._request_input].shape[0] == 1 else self._run)(*inputs)


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
    name = backend if backend != AUTO else "script" if device.type == "cpu" else "eager"
    if name == "script" and device.type != "cpu":
        raise DeviceError(f"backend 'script' runs on cpu, not on {device.type}; {nearest(backend, [b for b in BACKENDS if b != 'script'])}")
    if precision == "bf16" and not (name == "script" and has_packed_linear() and multiplies_bf16()):
        raise DeviceError(f"precision 'bf16' needs backend 'script' on a CPU with AMX or AVX512-bf16; here it is {name!r} on {device.type}")
    if backend == AUTO:
        log.info("graph runs by %s, precision %s", name, precision)
    inputs = inputs_of(module)
    place = next((place for place, given in enumerate(inputs) if given.role == "request"), None)
    try:
        run = BACKENDS[name](module, precision, False)
        run_one = run if one is None or one is module or place is None else BACKENDS[name](one, precision, True)
    except BundleError as error:
        if backend != AUTO or precision != "fp32":
            raise
        log.warning("backend %s cannot take this graph (%s): it runs operator by operator, which is slower", name, error)
        return lower(module, device, one=one, backend="eager")
    return Runner(name, precision, inputs, run, run_one, place or 0)


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 (AMX or AVX512-bf16)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _eager(module: fx.GraphModule, precision: Precision, one_request: bool) -> Run:
    return module


def _inductor(module: fx.GraphModule, precision: Precision, one_request: bool) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor imports what torch itself calls deprecated
        run: Run = torch.compile(module, dynamic=True)
    return run


def _script(module: fx.GraphModule, precision: Precision, one_request: bool) -> Run:
    module = _copy(module)
    fuse_gates(module)
    if has_packed_linear():
        pack_linears(module, bf16=precision == "bf16", one_request=one_request)
    return script(module)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own over the same weights."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph, "Packed").eval()


BACKENDS: dict[str, Callable[[fx.GraphModule, Precision, bool], Run]] = {"script": _script, "inductor": _inductor, "eager": _eager}
