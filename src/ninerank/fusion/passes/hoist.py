"""User-side hoisting: what depends on the request alone runs once a request, and its rows are repeated as late as possible.

    pattern   f(x[user_row], ...), every input with rows an expanded request value, f row by row
    rewrite   f(x, ...)[user_row]
    right     f treats each row by itself, and `user_row` repeats rows and changes none
    pays      where a request has more than one candidate: U rows instead of B

Applied along the graph, the expansion moves behind everything that needs the request alone: means of histories, projections of user
fields, key-only parts of attention.
"""

import torch
from torch import fx

from ninerank.fusion.concat import expand
from ninerank.fusion.editor import Editor
from ninerank.fusion.roles import expanded
from ninerank.fusion.rowwise import is_rowwise

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    return sum(_move(editor, node) for node in editor.calls())


def _move(editor: Editor, node: fx.Node) -> bool:
    sources = {other: expanded(other) for other in node.all_input_nodes if other.meta["role"] != "constant"}
    if expanded(node) is not None or not sources or None in sources.values() or not is_rowwise(editor, node):
        return False

    def before(other: fx.Node) -> fx.Node:
        return sources.get(other) or other

    args, kwargs = fx.map_arg((node.args, node.kwargs), before)
    with editor.before(node):
        editor.replace(node, expand(editor, editor.call(node.target, *args, **kwargs)))
    return True
