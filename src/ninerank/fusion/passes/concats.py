"""Concatenations moved later: what treats the parts of a concatenation alike runs on each part.

pattern   f(cat([x[user_row], y], d)) with f element by element, flattening, unsqueezing, summing over another dimension,
          or taking one of the parts
rewrite   cat([f(x[user_row]), f(y)], d')
right     such an f gives each part of its output from one part of its input
pays      together with hoisting and the splits that then meet a concatenation of parts of pure sides; alone it saves nothing
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from ninerank.fusion.concat import Concat, concat_of, expand, is_mixed
from ninerank.fusion.editor import Editor
from ninerank.fusion.roles import expanded
from ninerank.fusion.rowwise import POINTWISE, UNARY, axis

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    fired = 0
    for node in editor.calls():
        if node._erased:
            continue
        fired += _nested(editor, node) if node.target is aten.cat.default else _moved(editor, node)
    return fired


def _nested(editor: Editor, node: fx.Node) -> bool:
    """cat([cat([a, b]), c]) -> cat([a, b, c])."""
    outer = concat_of(editor, node)
    if outer is None:
        return False
    flat: list[fx.Node] = []
    for part in outer.parts:
        inner = concat_of(editor, part)
        flat += inner.parts if inner is not None and inner.dim == outer.dim and is_mixed(inner) else [part]
    if len(flat) == len(outer.parts):
        return False
    with editor.before(node):
        editor.replace(node, editor.call(aten.cat.default, flat, outer.dim))
    return True


def _moved(editor: Editor, node: fx.Node) -> bool:
    concats = {other: concat for other in node.all_input_nodes if (concat := concat_of(editor, other)) is not None}
    mixed = [other for other, concat in concats.items() if is_mixed(concat)]
    if not mixed:
        return False
    with editor.before(node):
        new = _by_part(editor, node, mixed[0], concats[mixed[0]])
        if new is None:
            return False
        editor.replace(node, new)
    return True


def _by_part(editor: Editor, node: fx.Node, source: fx.Node, concat: Concat) -> fx.Node | None:
    """The same value made from the parts; None where that cannot be."""
    if node.target is aten.select.int and node.args[0] is source and axis(node.args[1], editor.rank(source)) == concat.dim:
        return _selected(editor, node, concat)
    if node.target in POINTWISE:
        return _pointwise(editor, node, source, concat)
    dim = _dim_after(editor, node, concat)
    if dim is None:
        return None
    parts = [_called(editor, node, part, lambda source: (source, *node.args[1:])) for part in concat.parts]
    return editor.call(aten.cat.default, parts, dim)


def _called(editor: Editor, node: fx.Node, part: fx.Node, arguments: Callable[[fx.Node], Sequence[Any]]) -> fx.Node:
    """The operator on one part; on a request's rows before they are repeated, as hoisting would have it."""
    source = expanded(part)
    if source is None:
        return editor.call(node.target, *arguments(part), **node.kwargs)
    return expand(editor, editor.call(node.target, *arguments(source), **node.kwargs))


def _dim_after(editor: Editor, node: fx.Node, concat: Concat) -> int | None:
    """Where the concatenated dimension is after an operator that leaves it alone."""
    rank, dim = editor.rank(node.args[0]), concat.dim
    if node.target is aten.flatten.using_ints:
        end = axis(node.args[2], rank) if len(node.args) > 2 else rank - 1
        return dim if axis(node.args[1], rank) == dim and end < rank and _is_fixed(editor, node, dim) else None
    if node.target is aten.unsqueeze.default:
        return dim + (axis(node.args[1], rank + 1) <= dim)
    if node.target is aten.sum.dim_IntList and not node.kwargs:
        given: Any = node.args[1]
        dims = {axis(d, rank) for d in given}
        keeps = len(node.args) > 2 and node.args[2]
        return None if dim in dims or 0 in dims or not dims else dim if keeps else dim - sum(d < dim for d in dims)
    return None


def _is_fixed(editor: Editor, node: fx.Node, dim: int) -> bool:
    return editor.shape(node)[dim] not in editor.sizes.values() and all(
        size not in editor.sizes.values() for size in editor.shape(node.args[0])[dim:]
    )


def _selected(editor: Editor, node: fx.Node, concat: Concat) -> fx.Node | None:
    place = node.args[2]
    if not isinstance(place, int):
        return None
    place %= concat.starts[-1]
    part = next(p for p, end in enumerate(concat.starts[1:]) if place < end)
    return editor.call(aten.select.int, concat.parts[part], concat.dim, place - concat.starts[part])


def _pointwise(editor: Editor, node: fx.Node, source: fx.Node, concat: Concat) -> fx.Node | None:
    """Element by element, with constants cut where they vary along the concatenated dimension."""
    others = [other for other in node.all_input_nodes if other is not source]
    if editor.rank(node) != editor.rank(source) or (others and node.target in UNARY):
        return None
    back = editor.rank(source) - concat.dim  # counted from the end, where broadcasting aligns
    if editor.shape(node)[concat.dim] != concat.starts[-1]:
        return None  # the concatenation itself is broadcast
    if any(editor.constant(other) is None for other in others) or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None

    def cut(place: int, own: fx.Node, other: fx.Node) -> fx.Node:
        if other is source:
            return own
        weight = editor.constant(other)
        if weight is None or weight.dim() < back or weight.shape[-back] == 1:
            return other
        start, end = concat.starts[place : place + 2]
        return editor.store(f"part.{other.target}", weight.narrow(-back, start, end - start))

    def arguments(place: int, own: fx.Node) -> Sequence[Any]:
        cut_args: Sequence[Any] = fx.map_arg(node.args, partial(cut, place, own))
        return cut_args

    parts = [_called(editor, node, part, partial(arguments, place)) for place, part in enumerate(concat.parts)]
    return editor.call(aten.cat.default, parts, concat.dim)
