"""First layer of a compressed interaction network: products of two request fields once a request.

pattern   matmul(W, flatten(v[:, :, None] * v[:, None, :], 1, 2)),     v = cat([x[user_row], y]) over fields
rewrite   matmul(W_xx, x x)[user_row] + matmul(W_y, y [x[user_row], y])
right     sum_ij W_ij v_i v_j over blocks of fields; W_y has W_ij + W_ji where v_i is of the item and v_j of the request
pays      where the request has several fields: (Fu + Fi)^2 products of vectors a candidate become Fi (Fu + Fi)

Lian et al., xDeepFM, KDD 2018, equation 6. Deeper layers multiply with vectors of both sides and stay as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor, fx

from ninerank.fusion.concat import Concat, concat_of, expand, is_mixed, join, sides_of
from ninerank.fusion.editor import Editor
from ninerank.fusion.roles import expanded
from ninerank.fusion.rowwise import axis

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    return sum(_split(editor, node) for node in editor.calls(aten.matmul.default))


def _split(editor: Editor, node: fx.Node) -> bool:
    weight_HP, products = editor.constant(node.args[0]), node.args[1]
    if weight_HP is None or weight_HP.dim() != 2 or not isinstance(products, fx.Node) or products.target is not aten.flatten.using_ints:
        return False
    outer = products.args[0]
    if products.args[1:] != (1, 2) or not isinstance(outer, fx.Node) or outer.target is not aten.mul.Tensor:
        return False
    left, right = (_fields(editor, arg, dim) for arg, dim in zip(outer.args, (2, 1), strict=True))
    if left is None or right is None or left.parts != right.parts or not is_mixed(left):
        return False
    request, item = sides_of(left)
    num_fields = left.starts[-1]
    weight_HFF = weight_HP.double().view(-1, num_fields, num_fields)
    of_request, of_item = torch.tensor(request.columns), torch.tensor(item.columns)
    crossed = weight_HFF[:, of_item][:, :, of_request] + weight_HFF[:, of_request][:, :, of_item].transpose(1, 2)
    each = torch.cat([crossed, weight_HFF[:, of_item][:, :, of_item]], dim=2)
    with editor.before(node):
        x, y = join(editor, request.nodes, 1), join(editor, item.nodes, 1)
        once = _layer(editor, node, weight_HFF[:, of_request][:, :, of_request], x, x)
        both = editor.call(aten.cat.default, [expand(editor, x), y], 1)
        editor.replace(node, editor.call(aten.add.Tensor, _layer(editor, node, each, y, both), expand(editor, once)))
    return True


def _layer(editor: Editor, node: fx.Node, weight_HGF: Tensor, left: fx.Node, right: fx.Node) -> fx.Node:
    weight = editor.store(f"cin.{node.name}", weight_HGF.flatten(1).to(torch.float32))
    outer = editor.call(aten.mul.Tensor, editor.call(aten.unsqueeze.default, left, 2), editor.call(aten.unsqueeze.default, right, 1))
    return editor.call(aten.matmul.default, weight, editor.call(aten.flatten.using_ints, outer, 1, 2))


def _fields(editor: Editor, node: object, dim: int) -> Concat | None:
    """The fields (B, F, D) as a concatenation where `node` is unsqueeze(fields, dim), of the whole or of each part."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.unsqueeze.default and axis(node.args[1], 4) == dim:
        concat = concat_of(editor, node.args[0])
        return concat if concat is not None and concat.dim == 1 else None
    concat = concat_of(editor, node)
    if concat is None or concat.dim != 3 - dim:
        return None
    parts: list[fx.Node] = []
    for part in concat.parts:
        source = expanded(part)
        inner = part if source is None else source
        if inner.target is not aten.unsqueeze.default or axis(inner.args[1], 4) != dim:
            return None
        assert isinstance(inner.args[0], fx.Node)
        parts.append(_expansion_of(editor, part, inner.args[0]) if source is not None else inner.args[0])
    return replace(concat, parts=tuple(parts), dim=1)


def _expansion_of(editor: Editor, part: fx.Node, source: fx.Node) -> fx.Node:
    """The request value `source` with its rows repeated as those of `part` are."""
    for user in source.users:
        if expanded(user) is source:
            return user
    with editor.before(part):
        return expand(editor, source)
