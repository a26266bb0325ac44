"""Sums over fields of both sides: the request's share is summed once a request.

pattern   sum(cat([x[user_row], y], d), d)
rewrite   sum(x, d)[user_row] + sum(y, d)
right     a sum over a concatenation is the sum of the parts' sums
pays      where the request has many fields: the first-order term of LR, FM and DeepFM, and both sums of the FM interaction
          1/2 sum_d ((sum_f v_fd)^2 - sum_f v_fd^2), read U (Fu D) + B (Fi D) numbers instead of B (Fu + Fi) D
"""

from typing import Any

import torch
from torch import fx

from ninerank.fusion.concat import Side, concat_of, expand, is_mixed, join, sides_of
from ninerank.fusion.editor import Editor
from ninerank.fusion.rowwise import axis

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    return sum(_split(editor, node) for node in editor.calls(aten.sum.dim_IntList))


def _split(editor: Editor, node: fx.Node) -> bool:
    concat, dims = concat_of(editor, node.args[0]), node.args[1]
    if concat is None or not is_mixed(concat) or node.kwargs:
        return False
    assert isinstance(dims, (list, tuple))
    if concat.dim not in (axis(dim, editor.rank(node.args[0])) for dim in dims):
        return False
    rest = node.args[2:]

    def summed(side: Side) -> fx.Node:
        whole: Any = join(editor, side.nodes, concat.dim)
        return editor.call(aten.sum.dim_IntList, whole, list(dims), *rest)

    request, item = sides_of(concat)
    with editor.before(node):
        editor.replace(node, editor.call(aten.add.Tensor, summed(item), expand(editor, summed(request))))
    return True
