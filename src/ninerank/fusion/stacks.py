"""Values of one shape that lie side by side in one tensor: the outputs of experts, gates or towers.

Shape legend: B rows, E values side by side, H width of each.

    columns   (..., E H): value e is columns e H ... (e + 1) H
    second    (B, E, H)
    first     (E, B, H), as batched products give it
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from ninerank.fusion.editor import Editor
from ninerank.fusion.rowwise import axis

__all__ = ["Layout", "Stack", "part_of"]

aten = torch.ops.aten
Layout = Literal["columns", "second", "first"]


@dataclass(frozen=True)
class Stack:
    """count values of one shape in `whole`."""

    whole: fx.Node
    layout: Layout
    count: int

    def width(self, editor: Editor) -> int:
        size = editor.shape(self.whole)[-1]
        return size // self.count if self.layout == "columns" else size

    def part(self, editor: Editor, place: int) -> fx.Node:
        """Value `place`: a view."""
        if self.layout == "columns":
            width = self.width(editor)
            return editor.call(aten.slice.Tensor, self.whole, editor.rank(self.whole) - 1, place * width, (place + 1) * width)
        return editor.call(aten.select.int, self.whole, 0 if self.layout == "first" else 1, place)

    def first(self, editor: Editor) -> fx.Node:
        """All values as (E, B, H): a view where it can be one."""
        return self.whole if self.layout == "first" else editor.call(aten.transpose.int, self.second(editor), 0, 1)

    def second(self, editor: Editor) -> fx.Node:
        """All values as (B, E, H)."""
        if self.layout == "columns":
            return editor.call(aten.reshape.default, self.whole, [-1, self.count, self.width(editor)])
        return self.whole if self.layout == "second" else editor.call(aten.transpose.int, self.whole, 0, 1)

    def columns(self, editor: Editor) -> fx.Node:
        """All values as (B, E H); copied unless they lie so."""
        return self.whole if self.layout == "columns" else editor.call(aten.flatten.using_ints, self.second(editor), 1)


def part_of(editor: Editor, node: object) -> tuple[Stack, int] | None:
    """The stack of which `node` is a value with rows, (B, H), and its place; None for any other node."""
    if not isinstance(node, fx.Node) or editor.rank(node) != 2 or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    whole = node.args[0]
    assert isinstance(whole, fx.Node)
    shape = editor.shape(whole)
    if node.target is aten.slice.Tensor and len(node.args) == 4 and len(shape) == 2 and axis(node.args[1], 2) == 1:
        start, end = node.args[2:4]
        if isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= shape[1]:
            width = end - start
            if start % width == 0 and shape[1] % width == 0 and width < shape[1] and shape[1] not in editor.sizes.values():
                return Stack(whole, "columns", shape[1] // width), start // width
    if node.target is aten.select.int and len(shape) == 3 and isinstance(node.args[2], int):
        dim = axis(node.args[1], 3)
        rows = {editor.rows, editor.requests}
        if dim in (0, 1) and shape[1 - dim] in rows and shape[dim] not in editor.sizes.values():
            return Stack(whole, "first" if dim == 0 else "second", shape[dim]), node.args[2] % shape[dim]
    return None
