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

from ninerank.errors import DeviceError, nearest
from ninerank.fusion.backends.onednn import has_packed_linear, pack_linears
from ninerank.fusion.backends.script import script

__all__ = ["AUTO", "BACKENDS", "Precision", "Runner", "lower"]

log = logging.getLogger(__name__)

AUTO = "auto"
Precision = Literal["fp32", "bf16"]
Run = Callable[..., Tensor]


class Runner:
    """A graph bound to a device: takes its inputs in the order of the placeholders and returns logits_BT (float32).

    Requests of one user take a graph of their own where there is one: the user's row is then a bias, not a batch.
    """

    def __init__(self, backend: str, precision: Precision, run: Run, run_single: Run | None = None, request_input: int = 0) -> None:
        self.backend, self.precision = backend, precision
        self._run, self._run_single, self._request_input = run, run_single, request_input

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._run_single is not None and inputs[self._request_input].shape[0] == 1:
            return self._run_single(*inputs)
        return self._run(*inputs)


def lower(
    module: fx.GraphModule,
    device: torch.device,
    *,
    backend: str = AUTO,
    precision: Precision = "fp32",
    request_input: int | None = None,
) -> Runner:
    """Bind a graph of operators whose weights lie on `device`; the module itself stays as it is.

    request_input: which input has one row a request; None where requests are not told apart. Raises DeviceError for a backend that is
    unknown or does not run here, and for bf16 where the device does not multiply it.
    """
    if backend != AUTO and backend not in BACKENDS:
        raise DeviceError(f"unknown backend {backend!r}; {nearest(backend, [AUTO, *BACKENDS])}")
    name = backend if backend != AUTO else "script" if device.type == "cpu" else "eager"
    if name == "script" and device.type != "cpu":
        raise DeviceError(f"backend 'script' runs on cpu, not on {device.type}; {nearest(backend, [b for b in BACKENDS if b != 'script'])}")
    if precision == "bf16" and not (name == "script" and has_packed_linear() and _multiplies_bf16()):
        raise DeviceError(f"precision 'bf16' needs backend 'script' on a CPU with AMX or AVX512-bf16; here it is {name!r} on {device.type}")
    if backend == AUTO:
        log.info("graph runs by %s, precision %s", name, precision)
    return BACKENDS[name](plain(module), precision, request_input)


def plain(module: fx.GraphModule) -> fx.GraphModule:
    """A copy, weights shared, of operators, sizes and weights alone: without the checks and calling convention that torch.export adds."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or node.users:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _multiplies_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _eager(module: fx.GraphModule, precision: Precision, request_input: int | None) -> Runner:
    return Runner("eager", precision, _logits(module))


def _inductor(module: fx.GraphModule, precision: Precision, request_input: int | None) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor imports what torch itself calls deprecated
        return Runner("inductor", precision, _logits(torch.compile(module, dynamic=True)))


def _script(module: fx.GraphModule, precision: Precision, request_input: int | None) -> Runner:
    def compiled(single_request: bool) -> Run:
        own = plain(module)
        if has_packed_linear():
            pack_linears(own, bf16=precision == "bf16", single_request=single_request)
        return _logits(script(own))

    if request_input is None:
        return Runner("script", precision, compiled(single_request=False))
    return Runner("script", precision, compiled(single_request=False), compiled(single_request=True), request_input)


def _logits(run: Callable[..., Tensor | Sequence[Tensor]]) -> Run:
    """A graph's single output, which an exported graph wraps in a tuple."""

    def call(*inputs: Tensor) -> Tensor:
        out = run(*inputs)
        return out if isinstance(out, Tensor) else out[0]

    return call


BACKENDS: dict[str, Callable[[fx.GraphModule, Precision, int | None], Runner]] = {
    "script": _script,
    "inductor": _inductor,
    "eager": _eager,
}
