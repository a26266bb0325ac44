"""A Linear over fields of both sides, split into a request half and an item half.

    pattern   linear(cat([x[user_row], y, ...]), W, b)          parts in any order, permuted by constant columns or not
    rewrite   linear(y, W_y) + linear(x, W_x, b)[user_row]      W_x, W_y the columns of W that meet x and y, contiguous
    right     W [x, y] = W_x x + W_y y
    pays      where the request has more than a few numbers: B (I_x + I_y) O products become U I_x O + B I_y O

Parts of one side are concatenated and meet one contiguous weight: a product for every fragment would cost more than it saves.
The first layers of MLPs, of cross networks (W x_0 + b, or V^T x_0 with low rank) and of bottom MLPs all have this form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ninerank.fusion.concat import concat_of, expand, join
from ninerank.fusion.editor import Editor
from ninerank.fusion.roles import expanded
from ninerank.fusion.rowwise import axis

__all__ = ["apply", "split_items"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Leaf:
    """A part, and the column of the weight that each of its columns meets."""

    node: fx.Node
    columns: tuple[int, ...]


def apply(editor: Editor) -> int:
    return sum(_split(editor, node) for node in editor.calls(aten.linear.default))


def _split(editor: Editor, node: fx.Node) -> bool:
    source, weight_OI = node.args[0], editor.constant(node.args[1])
    if weight_OI is None or not isinstance(source, fx.Node) or editor.rank(source) < 2:
        return False
    leaves = _leaves(editor, source, tuple(range(weight_OI.shape[1])))
    request = [leaf for leaf in leaves if expanded(leaf.node) is not None]
    item = [leaf for leaf in leaves if expanded(leaf.node) is None]
    is_permuted = [c for leaf in leaves for c in leaf.columns] != list(range(weight_OI.shape[1]))
    if not item or not (request or is_permuted) or (request and editor.rank(source) != 2):
        return False
    bias = [arg for arg in node.args[2:] if arg is not None]
    with editor.before(node):
        if not request:
            new = _linear(editor, node, weight_OI, [leaf.node for leaf in item], item, bias)
        else:
            sources = [known for leaf in request if (known := expanded(leaf.node)) is not None]
            once = expand(editor, _linear(editor, node, weight_OI, sources, request, bias))
            each = _linear(editor, node, weight_OI, [leaf.node for leaf in item], item, [])
            new = editor.call(aten.add.Tensor, each, once)
        editor.replace(node, new)
    return True


def split_items(editor: Editor) -> int:
    """Split Linears over items' columns and others, so that the items' share depends on the item alone; returns how many.

    It saves nothing where the whole graph runs, but lets the share be kept by item.
    """
    return sum(_split_items(editor, node) for node in editor.calls(aten.linear.default))


def _split_items(editor: Editor, node: fx.Node) -> bool:
    source, weight_OI = node.args[0], editor.constant(node.args[1])
    if weight_OI is None or not isinstance(source, fx.Node) or editor.rank(source) != 2 or source.meta["role"] != "joint":
        return False
    leaves = _leaves(editor, source, tuple(range(weight_OI.shape[1])))
    item = [leaf for leaf in leaves if leaf.node.meta["role"] == "item"]
    other = [leaf for leaf in leaves if leaf.node.meta["role"] != "item"]
    if not item or not other:
        return False
    bias = [arg for arg in node.args[2:] if arg is not None]
    with editor.before(node):
        kept = _linear(editor, node, weight_OI, [leaf.node for leaf in item], item, [])
        rest = _linear(editor, node, weight_OI, [leaf.node for leaf in other], other, bias)
        editor.replace(node, editor.call(aten.add.Tensor, rest, kept))
    return True


def _leaves(editor: Editor, node: fx.Node, columns: tuple[int, ...]) -> list[_Leaf]:
    """Parts of concatenations along the last dimension, through permutations of its columns."""
    last = editor.rank(node) - 1
    concat = concat_of(editor, node)
    if concat is not None and concat.dim == last:
        pairs = zip(concat.parts, concat.starts[:-1], concat.starts[1:], strict=True)
        return [leaf for part, start, end in pairs for leaf in _leaves(editor, part, columns[start:end])]
    if node.target is aten.index_select.default and axis(node.args[1], last + 1) == last and last > 0:
        inner, index = node.args[0], editor.constant(node.args[2])
        if isinstance(inner, fx.Node) and index is not None and _is_permutation(index, editor.shape(inner)[last]):
            place_of = dict(zip(index.tolist(), columns, strict=True))
            return _leaves(editor, inner, tuple(place_of[column] for column in range(len(columns))))
    return [_Leaf(node, columns)] if columns else []


def _is_permutation(index: Tensor, width: int) -> bool:
    return index.numel() == width and bool((index.sort().values == torch.arange(width)).all())


def _linear(editor: Editor, node: fx.Node, weight_OI: Tensor, nodes: list[fx.Node], leaves: list[_Leaf], bias: Sequence[Any]) -> fx.Node:
    columns = torch.tensor([column for leaf in leaves for column in leaf.columns], dtype=torch.int64)
    whole = join(editor, tuple(nodes), editor.rank(nodes[0]) - 1)
    name = f"{node.args[1].target}.{'request' if nodes[0] is not leaves[0].node else 'item'}"  # type: ignore[union-attr]
    return editor.call(aten.linear.default, whole, editor.store(f"split.{name}", weight_OI[:, columns]), *bias)
