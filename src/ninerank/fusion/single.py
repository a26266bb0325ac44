"""A graph for one request: what was repeated for each candidate is broadcast.

With U = 1 every `x[user_row]` is the one row of x. Element-wise operators broadcast it as it is; a product with keys that all
candidates share is one large product instead of many small ones; the request half of a split Linear becomes the bias of the item half.
Where an operator needs rows of its own the one row is expanded, which copies nothing.
"""

from typing import Any

import torch
from torch import fx

from ninerank.fusion.capture import REQUESTS
from ninerank.fusion.concat import user_row
from ninerank.fusion.editor import Editor, named_sizes
from ninerank.fusion.roles import expanded
from ninerank.fusion.rowwise import POINTWISE, UNARY

__all__ = ["single_request"]

aten = torch.ops.aten


def single_request(module: fx.GraphModule) -> fx.GraphModule:
    """The same function for U = 1; the inputs stay, and `user_row` is read for its length alone."""
    editor = Editor(module, named_sizes(module) | {REQUESTS: 1})
    for node in editor.calls():
        source = expanded(node)
        if source is None:
            continue
        for user in list(node.users):
            with editor.before(user):
                _broadcast(editor, user, node, source)
        if node.users:
            with editor.before(node):
                count = editor.size(user_row(editor), 0)
                editor.replace(node, editor.call(aten.expand.default, source, [count, *[-1] * (editor.rank(node) - 1)]))
    return editor.done()


def _broadcast(editor: Editor, user: fx.Node, node: fx.Node, source: fx.Node) -> None:
    """Let `user` read the one row of `source` in place of `node`, where it can."""
    if user.target is aten.add.Tensor and user.args[1] is node and not user.kwargs and _takes_bias(editor, user.args[0], node):
        linear: Any = user.args[0]
        editor.replace(user, editor.call(aten.linear.default, *linear.args[:2], editor.call(aten.squeeze.dim, source, 0)))
    elif user.target is aten.bmm.default and user.args[1] is node and user.args[0] is not node:
        editor.replace(user, editor.call(aten.matmul.default, user.args[0], editor.call(aten.squeeze.dim, source, 0)))
    elif user.target in POINTWISE and user.target not in UNARY and _has_rows(editor, user, node):
        user.replace_input_with(node, source)


def _takes_bias(editor: Editor, linear: object, node: fx.Node) -> bool:
    return (
        isinstance(linear, fx.Node)
        and linear.target is aten.linear.default
        and len(linear.args) == 2
        and len(linear.users) == 1
        and editor.shape(linear) == editor.shape(node)
        and editor.rank(node) == 2
    )


def _has_rows(editor: Editor, user: fx.Node, node: fx.Node) -> bool:
    """Whether something else gives `user` its rows."""
    return any(
        other is not node and editor.rank(other) == editor.rank(user) and editor.shape(other)[0] == editor.rows
        for other in user.all_input_nodes
    )
