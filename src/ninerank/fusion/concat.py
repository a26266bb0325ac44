"""Reading of concatenations whose parts belong to different sides."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ninerank.fusion.editor import Editor
from ninerank.fusion.roles import USER_ROW, expanded
from ninerank.fusion.rowwise import axis

__all__ = ["Concat", "Side", "concat_of", "expand", "is_mixed", "join", "sides_of", "user_row"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Concat:
    """cat(parts, dim), dim counted from the front; starts[i] is where part i begins, the last one where all end."""

    parts: tuple[fx.Node, ...]
    dim: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """Parts of one side with the columns of the whole that each fills. is_request: nodes hold one row a request, not yet expanded."""

    nodes: tuple[fx.Node, ...]
    columns: tuple[int, ...]
    is_request: bool


def concat_of(editor: Editor, node: object) -> Concat | None:
    """A concatenation of parts of fixed width along another dimension than the rows'; None for any other node."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    parts: Any = node.args[0]
    dim = axis(node.args[1] if len(node.args) > 1 else 0, editor.rank(node))
    widths = [editor.shape(part)[dim] for part in parts] if dim > 0 else []
    if not widths or any(width in editor.sizes.values() for width in widths):
        return None
    starts = tuple(sum(widths[:place]) for place in range(len(widths) + 1))
    return Concat(tuple(parts), dim, starts)


def is_mixed(concat: Concat | None) -> bool:
    """Whether some parts are expanded request values and some are not."""
    if concat is None:
        return False
    sources = [expanded(part) for part in concat.parts]
    return any(s is not None for s in sources) and any(s is None for s in sources)


def sides_of(concat: Concat) -> tuple[Side, Side]:
    """The request's parts (as they were before they were expanded), and all others."""

    def side(is_request: bool) -> Side:
        nodes: list[fx.Node] = []
        columns: list[int] = []
        for place, part in enumerate(concat.parts):
            source = expanded(part)
            if (source is not None) == is_request:
                nodes.append(part if source is None else source)
                columns += range(concat.starts[place], concat.starts[place + 1])
        return Side(tuple(nodes), tuple(columns), is_request)

    return side(True), side(False)


def join(editor: Editor, nodes: tuple[fx.Node, ...], dim: int) -> fx.Node:
    """cat(nodes, dim), or the one node."""
    return nodes[0] if len(nodes) == 1 else editor.call(aten.cat.default, list(nodes), dim)


def expand(editor: Editor, node: fx.Node) -> fx.Node:
    """The rows of a request value, repeated for the request's candidates."""
    return editor.call(aten.index_select.default, node, 0, user_row(editor))


def user_row(editor: Editor) -> fx.Node:
    """The input that names the request of each candidate."""
    found: list[fx.Node] = [node for node in editor.graph.find_nodes(op="placeholder") if node.meta["input"].name == USER_ROW]
    if not found:
        raise ValueError("the graph has no input 'user_row'")
    return found[0]
