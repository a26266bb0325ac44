"""Graphs run by OpenVINO, whose CPU plugin fuses and packs for itself and runs on threads of its own, one a request.

    graph of aten operators --torch.export--> OpenVINO model --compile_model--> requests, one for each calling thread

It knows no operator of ours, so that it takes the graph before backends fuse anything; lookups stay outside. Converting takes seconds.
What it made is compared with the graph before it is used: release 2026.4 was seen to divide a sum by a number wrongly (`prepare`).
"""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ninerank.errors import BundleError, DeviceError
from ninerank.fusion.backends.copies import own_copy
from ninerank.fusion.capture import REQUESTS, ROWS, examples_of, inputs_of
from ninerank.fusion.verify import draw_inputs

__all__ = ["EXTRA", "compiled", "prepare", "require"]

aten = torch.ops.aten

EXTRA = "openvino"
HINTS = {"fp32": "f32", "bf16": "bf16"}

# Sizes to compare at, and what scores may differ by: rounding, and no mistake.
SIZES = ((1, 1, 1), (1, 9, 4), (3, 8, 5))
ALLOWED = {"fp32": 1e-4, "bf16": 5e-2}

Run = Callable[..., Tensor]


def require() -> Any:
    """The package; raises DeviceError, with the line that installs it, where it is not there."""
    try:
        import openvino
    except ImportError as error:
        raise DeviceError(f"backend 'openvino' needs the package openvino ({error}): pip install 'ninerank[{EXTRA}]'") from None
    return openvino


def prepare(module: fx.GraphModule, precision: str) -> fx.GraphModule:
    """A copy as `compiled` takes it. Divisions by a number are multiplications: a sum over rows divided by one came out wrong."""
    module = own_copy(module)
    module.meta["precision"] = precision
    for node in list(module.graph.nodes):
        if node.target is aten.div.Tensor and isinstance(node.args[1], int | float) and node.args[1] and not node.kwargs:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_function(aten.mul.Tensor, (node.args[0], 1.0 / node.args[1])))
            module.graph.erase_node(node)
    module.recompile()
    return module


def compiled(module: fx.GraphModule, *, one_request: bool = False) -> Run:
    """What runs a prepared graph, from any number of threads at once; raises BundleError for one that it cannot take, or runs wrongly.

    As many requests run at the same time as there are processors, each on one thread.
    """
    vino, inputs, precision = require(), inputs_of(module), module.meta["precision"]
    examples, dynamic = examples_of(inputs, fixed={REQUESTS: 1} if one_request else {})
    try:
        with torch.no_grad(), _own_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export and OpenVINO warn of their own internals
            program = torch.export.export(_Positional(module), examples, dynamic_shapes=(dynamic,), strict=False)
            # Inputs that nothing reads are left out of its model; names tell which are there.
            places = {name: place for place, name in enumerate(program.graph_signature.user_inputs)}
            model = vino.convert_model(program)
        threads = str(os.cpu_count() or 1)
        settings = {"INFERENCE_PRECISION_HINT": HINTS[precision], "NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads}
        ready = vino.Core().compile_model(model, "CPU", settings)
        order = [places[given.get_any_name()] for given in ready.inputs]
    except Exception as error:  # a converter that does not know an operator fails in any way
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise BundleError(f"OpenVINO cannot take the graph: {type(error).__name__}: {first_line}") from error
    own = threading.local()

    def call(*given: Tensor) -> Tensor:
        request = getattr(own, "request", None)
        if request is None:
            request = own.request = ready.create_infer_request()
        arrays = [given[place].contiguous().numpy() for place in order]
        answer = request.infer(arrays, share_inputs=True, share_outputs=True)
        # The request writes its next answer to the same memory.
        return torch.from_numpy(answer[0].copy())

    _compare(module, call, precision, one_request)
    return call


@contextmanager
def _own_logging() -> Iterator[None]:
    """Undo what the converter does to the process's logging when it fails: it raises the root's level."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def _compare(module: fx.GraphModule, call: Run, precision: str, one_request: bool) -> None:
    draw, inputs = torch.Generator().manual_seed(0), inputs_of(module)
    for requests, rows, length in SIZES:
        if requests > 1 and one_request:
            continue
        sizes = dict.fromkeys((dim for given in inputs for dim in given.dims if isinstance(dim, str)), length)
        values = tuple(draw_inputs(inputs, {**sizes, REQUESTS: requests, ROWS: rows}, draw).values())
        with torch.inference_mode():
            difference = _difference(call(*values), module(*values))
        if not difference <= ALLOWED[precision]:
            raise BundleError(
                f"OpenVINO runs the graph wrongly: scores differ by {difference:.3g}, at most {ALLOWED[precision]:g} is allowed"
            )


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((torch.sigmoid(got) - torch.sigmoid(want)).abs().nan_to_num(nan=float("inf")).max())


class _Positional(nn.Module):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.module(*inputs)
        return out
