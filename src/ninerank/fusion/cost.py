"""What a graph costs by count: operators, floating point operations, bytes moved, kernels launched.

Counts are for one request (U = 1) with `NOMINAL` candidates, each kernel by itself: inputs are read once, outputs written once, views
cost nothing. `modelled_us` weighs them with figures of one core of a server CPU; it decides whether a pass pays, and is no forecast.
"""

import math
from typing import Any

import torch
from torch import fx

from ninerank.config import Config
from ninerank.fusion.capture import REQUESTS, ROWS
from ninerank.fusion.editor import Editor, size_names

__all__ = ["NOMINAL_LENGTH", "NOMINAL_ROWS", "VIEWS", "Cost", "measure"]

NOMINAL_ROWS, NOMINAL_LENGTH = 256, 50
FLOPS_PER_US, BYTES_PER_US, LAUNCH_US = 50e3, 10e3, 2.0
aten = torch.ops.aten
VIEWS = frozenset(
    {
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.detach.default,
        aten.alias.default,
    }
)
_PER_ELEMENT: dict[Any, int] = {
    aten.softmax.int: 5,
    aten.sigmoid.default: 4,
    aten.tanh.default: 6,
    aten.gelu.default: 8,
    aten.batch_norm.default: 4,
}
_NO_ARITHMETIC = frozenset({aten.cat.default, aten.index_select.default, aten.to.dtype, aten.clone.default, aten.stack.default})


class Cost(Config):
    """Counts of one graph. nodes: operators, views included."""

    nodes: int = 0
    flops: int = 0
    bytes_moved: int = 0
    launches: int = 0

    @property
    def modelled_us(self) -> float:
        return self.flops / FLOPS_PER_US + self.bytes_moved / BYTES_PER_US + self.launches * LAUNCH_US


def measure(module: fx.GraphModule, *, requests: int = 1, rows: int = NOMINAL_ROWS, length: int = NOMINAL_LENGTH) -> Cost:
    """Cost of a captured graph at these sizes."""
    sizes = dict.fromkeys(size_names(module), length) | {REQUESTS: requests, ROWS: rows}
    editor = Editor(module, sizes)
    counts = [node_cost(editor, node) for node in editor.calls()]
    return Cost(
        nodes=len(counts),
        flops=sum(c.flops for c in counts),
        bytes_moved=sum(c.bytes_moved for c in counts),
        launches=sum(c.launches for c in counts),
    )


def node_cost(editor: Editor, node: fx.Node) -> Cost:
    """Cost of one call."""
    value: Any = node.meta["val"]
    if node.target in VIEWS or not isinstance(value, torch.Tensor):
        return Cost(nodes=1)
    tensors = [v for v in (other.meta["val"] for other in node.all_input_nodes) if isinstance(v, torch.Tensor)]
    moved = sum(_stored_bytes(tensor) for tensor in (value, *tensors))
    if node.target is aten.index_select.default:  # reads what it selects
        moved = 2 * _stored_bytes(value)
    return Cost(nodes=1, flops=_flops(editor, node, value), bytes_moved=moved, launches=1)


def _stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the places that a tensor has in memory: what is expanded counts once."""
    return (
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 1) * tensor.element_size()
    )


def _flops(editor: Editor, node: fx.Node, value: torch.Tensor) -> int:
    count = value.numel()
    if node.target is aten.linear.default:
        return 2 * count * editor.shape(node.args[0])[-1]
    if node.target in (aten.bmm.default, aten.matmul.default, aten.mm.default):
        return 2 * count * editor.shape(node.args[0])[-1]
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        return 2 * count * editor.shape(node.args[1])[-1]
    if node.target in _NO_ARITHMETIC:
        return 0
    read = max((math.prod(editor.shape(other)) for other in node.all_input_nodes), default=0)
    return max(count, read) * _PER_ELEMENT.get(node.target, 1)
