"""Graphs compiled ahead by torch's AOTInductor, kept on disk: compiling takes a minute, loading what is there takes milliseconds.

What is kept is the code alone. Weights are inputs of it, so that tomorrow's model of the same architecture finds it too. The key is the
graph (operators, sizes, types of weights), the versions of what made it, and the device; the folder is NINERANK_CACHE_DIR, or the user's
cache folder. What cannot be read is made again.
"""

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from ninerank import __version__
from ninerank.errors import BundleError
from ninerank.files import replacing
from ninerank.fusion.capture import REQUESTS, examples_of, inputs_of, weight_of

__all__ = ["compiled", "key_of"]

log = logging.getLogger(__name__)

Run = Callable[..., Tensor]


def compiled(module: fx.GraphModule, device: torch.device, *, one_request: bool = False) -> Run:
    """What runs the graph, compiled now or before; raises BundleError for a graph that cannot be compiled here."""
    own, weights = _lifted(module)
    file = _folder() / f"{key_of(module, device, one_request=one_request)}.pt2"
    run = _loaded(file, device)
    if run is None:
        log.info("compiling a graph for %s, about a minute; it is kept as %s", device, file)
        _compile(own, module, weights, device, one_request, file)
        run = _loaded(file, device)
        if run is None:
            raise BundleError(f"what AOTInductor compiled for {device} cannot be loaded: {file}")
    loaded = run

    def call(*inputs: Tensor) -> Tensor:
        out: Tensor = loaded(*inputs, *weights)
        return out

    return call


def key_of(module: fx.GraphModule, device: torch.device, *, one_request: bool = False) -> str:
    """What a compiled graph is kept under: equal for graphs that differ in the values of their weights alone."""
    weights = [weight_of(module, str(node.target)) for node in module.graph.find_nodes(op="get_attr")]
    parts = (
        module.code,
        [(given.name, given.dims, str(given.dtype)) for given in inputs_of(module)],
        [(tuple(weight.shape), str(weight.dtype)) for weight in weights],
        one_request,
        (__version__, torch.__version__, torch.version.cuda),
        (device.type, _hardware(device)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _hardware(device: torch.device) -> str:
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else str(torch.cuda.get_device_properties(device).name)


def _folder() -> Path:
    given = os.environ.get("NINERANK_CACHE_DIR")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ninerank"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        log.warning("%s cannot be written: compiled graphs are not kept (NINERANK_CACHE_DIR names another folder)", folder)
        return Path(tempfile.mkdtemp(prefix="ninerank-"))
    return folder


def _lifted(module: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph with its weights as inputs behind its own, and these weights."""
    graph, copies, weights = fx.Graph(), dict[fx.Node, fx.Node](), list[Tensor]()
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for node in module.graph.find_nodes(op="get_attr"):
        copies[node] = graph.placeholder(f"weight_{len(weights)}")
        weights.append(weight_of(module, str(node.target)).detach())
    for node in module.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(nn.Module(), graph, "Lifted").eval(), weights


def _compile(
    own: fx.GraphModule, module: fx.GraphModule, weights: list[Tensor], device: torch.device, one_request: bool, file: Path
) -> None:
    examples, dynamic = examples_of(inputs_of(module), fixed={REQUESTS: 1} if one_request else {})
    arguments = (*(example.to(device) for example in examples), *weights)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch uses what torch calls deprecated
            program = torch.export.export(_Positional(own), arguments, dynamic_shapes=((*dynamic, *({} for _ in weights)),), strict=False)
            with replacing(file) as temporary:
                package = temporary.with_suffix(".pt2")
                torch._inductor.aoti_compile_and_package(program, package_path=str(package))
                package.replace(temporary)
    except OSError:
        raise
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise BundleError(f"AOTInductor cannot compile the graph for {device}: {type(error).__name__}: {first_line}") from error


class _Positional(nn.Module):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.module(*inputs)
        return out


def _loaded(file: Path, device: torch.device) -> Run | None:
    if not file.exists():
        return None
    try:
        run: Run = torch._inductor.aoti_load_package(str(file), device_index=-1 if device.type == "cpu" else device.index)
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of it
        log.warning("compiled graph %s cannot be read and is made again (%s)", file, error)
        return None
    return run
