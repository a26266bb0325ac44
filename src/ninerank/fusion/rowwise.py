"""Which operators treat every row by itself: f(x)[b] is a function of x[b] and of constants alone.

For such an f, f(x[user_row]) = f(x)[user_row]: it may run before the rows of a request are repeated for its candidates, or after.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ninerank.fusion.editor import Editor

__all__ = ["POINTWISE", "UNARY", "axis", "is_rowwise"]

aten = torch.ops.aten
# Functions of one tensor, element by element; further arguments are numbers or types.
UNARY = frozenset(
    {
        aten.abs.default,
        aten.add.Scalar,
        aten.bitwise_not.default,
        aten.clamp.default,
        aten.clone.default,
        aten.div.Scalar,
        aten.elu.default,
        aten.exp.default,
        aten.gelu.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log.default,
        aten.log1p.default,
        aten.logical_not.default,
        aten.mul.Scalar,
        aten.nan_to_num.default,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.reciprocal.default,
        aten.relu.default,
        aten.rsqrt.default,
        aten.rsub.Scalar,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softplus.default,
        aten.sqrt.default,
        aten.square.default,
        aten.sub.Scalar,
        aten.tanh.default,
        aten.to.dtype,
    }
)
# Functions of several tensors, element by element after broadcasting.
POINTWISE = UNARY | {
    aten.add.Tensor,
    aten.addcmul.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.div.Tensor,
    aten.eq.Scalar,
    aten.eq.Tensor,
    aten.ge.Scalar,
    aten.gt.Scalar,
    aten.le.Scalar,
    aten.logical_and.default,
    aten.lt.Scalar,
    aten.masked_fill.Scalar,
    aten.maximum.default,
    aten.minimum.default,
    aten.mul.Tensor,
    aten.ne.Scalar,
    aten.sub.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}


def axis(dim: object, rank: int) -> int:
    """A dimension counted from the front; -1 for what is no number."""
    return dim % rank if isinstance(dim, int) and rank else -1


def is_rowwise(editor: Editor, node: fx.Node) -> bool:
    """Whether `node` treats row b of its inputs by itself, for inputs that have rows in dimension 0 or are constant."""
    check = _CHECKS.get(node.target, _pointwise if node.target in POINTWISE else None)
    if check is None or not editor.shape(node):
        return False
    if not all(isinstance(other.meta["val"], torch.Tensor) for other in node.all_input_nodes):
        return False  # a size among the arguments
    return check(editor, node)


def _pointwise(editor: Editor, node: fx.Node) -> bool:
    """Rows meet rows: what has rows has the rank of the result, and constants are broadcast along them."""
    rank = editor.rank(node)
    return all(
        editor.rank(other) < rank or editor.shape(other)[0] == 1 if other.meta["role"] == "constant" else editor.rank(other) == rank
        for other in node.all_input_nodes
    )


def _dims(position: int, *, added: int = 0) -> Callable[[Editor, fx.Node], bool]:
    """The dimension, or dimensions, at this place of the arguments leave rows alone."""

    def check(editor: Editor, node: fx.Node) -> bool:
        if len(node.args) <= position:
            return False
        given: Any = node.args[position]
        rank = editor.rank(node.args[0]) + added
        dims = given if isinstance(given, (list, tuple)) else [given]
        return bool(dims) and all(axis(dim, rank) > 0 for dim in dims)

    return check


def _select_columns(editor: Editor, node: fx.Node) -> bool:
    index = node.args[2]
    return _dims(1)(editor, node) and isinstance(index, fx.Node) and index.meta["role"] == "constant"


def _two_dims(editor: Editor, node: fx.Node) -> bool:
    return _dims(1)(editor, node) and _dims(2)(editor, node)


def _permuted(editor: Editor, node: fx.Node) -> bool:
    dims: Any = node.args[1]
    return axis(dims[0], editor.rank(node)) == 0


def _joined(editor: Editor, node: fx.Node) -> bool:
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    return axis(dim, editor.rank(node)) > 0 and all(part.meta["role"] != "constant" for part in parts)


def _stacked(editor: Editor, node: fx.Node) -> bool:
    parts: Any = node.args[0]
    return axis(node.args[1] if len(node.args) > 1 else 0, editor.rank(node)) > 0 and all(part.meta["role"] != "constant" for part in parts)


def _constants_from(position: int, *, least_rank: int = 2) -> Callable[[Editor, fx.Node], bool]:
    """Rows are in the first argument, and whatever follows from `position` on is constant."""

    def check(editor: Editor, node: fx.Node) -> bool:
        rest = [other for other in node.args[position:] if isinstance(other, fx.Node)]
        return editor.rank(node.args[0]) >= least_rank and all(other.meta["role"] == "constant" for other in rest)

    return check


def _batch_norm(editor: Editor, node: fx.Node) -> bool:
    return node.args[5:6] == (False,) and _constants_from(1)(editor, node)


def _layer_norm(editor: Editor, node: fx.Node) -> bool:
    normalized: Any = node.args[1]
    return len(normalized) < editor.rank(node.args[0]) and _constants_from(2)(editor, node)


def _products(editor: Editor, node: fx.Node) -> bool:
    """Batched products of what has rows in all arguments."""
    return all(editor.rank(other) == 3 and other.meta["role"] != "constant" for other in node.all_input_nodes)


def _matmul(editor: Editor, node: fx.Node) -> bool:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if left.meta["role"] == "constant":
        return False
    if right.meta["role"] == "constant":
        return editor.rank(left) >= 2 and editor.rank(right) <= 2
    return editor.rank(left) == editor.rank(right) >= 3


def _reshaped(editor: Editor, node: fx.Node) -> bool:
    """Rows keep their place, and are left to be counted."""
    sizes: Any = node.args[1]
    return sizes[0] == -1 and all(isinstance(size, int) and size > 0 for size in sizes[1:]) and editor.shape(node)[0] == editor.rows


def _expanded_as(editor: Editor, node: fx.Node) -> bool:
    return all(other.meta["role"] != "constant" for other in node.all_input_nodes) and (
        editor.rank(node.args[0]) == editor.rank(node.args[1]) and editor.shape(node.args[0])[0] == editor.shape(node)[0]
    )


_CHECKS: dict[Any, Callable[[Editor, fx.Node], bool]] = {
    aten.amax.default: _dims(1),
    aten.baddbmm.default: _products,
    aten.batch_norm.default: _batch_norm,
    aten.bmm.default: _products,
    aten.cat.default: _joined,
    aten.expand_as.default: _expanded_as,
    aten.flatten.using_ints: _dims(1),
    aten.index_select.default: _select_columns,
    aten.layer_norm.default: _layer_norm,
    aten.linear.default: _constants_from(1),
    aten.matmul.default: _matmul,
    aten.mean.dim: _dims(1),
    aten.permute.default: _permuted,
    aten.prelu.default: _constants_from(1),
    aten.reshape.default: _reshaped,
    aten.select.int: _dims(1),
    aten.slice.Tensor: _dims(1),
    aten.softmax.int: _dims(1),
    aten.squeeze.dim: _dims(1),
    aten.stack.default: _stacked,
    aten.sum.dim_IntList: _dims(1),
    aten.transpose.int: _two_dims,
    aten.unsqueeze.default: _dims(1, added=1),
    aten.view.default: _reshaped,
}
