"""Dot interaction: products of two request fields once a request.

pattern   index_select(flatten(bmm(v, v^T)), columns),   v = cat([x[user_row], y]) over fields
rewrite   cat([(x x^T)[user_row], y x[user_row]^T, y y^T]) at the columns asked for, in their order
right     the Gram matrix of concatenated rows is made of the blocks x x^T, x y^T, y x^T, y y^T; it is symmetric
pays      where the request has several fields: (Fu + Fi)^2 products a candidate become Fi (Fu + Fi); a Linear that reads them is then
          split as well, and takes the order of the columns into its weight
"""

import torch
from torch import Tensor, fx

from ninerank.fusion.concat import concat_of, expand, is_mixed, join, sides_of
from ninerank.fusion.editor import Editor
from ninerank.fusion.rowwise import axis

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    return sum(_split(editor, node) for node in editor.calls(aten.index_select.default))


def _gram_of(editor: Editor, node: fx.Node) -> fx.Node | None:
    """v where `node` selects columns of flatten(bmm(v, v^T), 1)."""
    flat = node.args[0]
    if axis(node.args[1], editor.rank(flat)) != 1 or not isinstance(flat, fx.Node) or flat.target is not aten.flatten.using_ints:
        return None
    gram = flat.args[0]
    if flat.args[1:] not in ((1,), (1, -1)) or not isinstance(gram, fx.Node) or gram.target is not aten.bmm.default:
        return None
    left, right = gram.args
    if not isinstance(right, fx.Node) or right.target is not aten.transpose.int or right.args[0] is not left:
        return None
    is_swap = {axis(right.args[1], 3), axis(right.args[2], 3)} == {1, 2}
    return left if is_swap and isinstance(left, fx.Node) else None


def _split(editor: Editor, node: fx.Node) -> bool:
    fields, index_P = _gram_of(editor, node), editor.constant(node.args[2])
    concat = concat_of(editor, fields)
    if concat is None or index_P is None or concat.dim != 1 or not is_mixed(concat):
        return False
    request, item = sides_of(concat)
    num_request, num_item = len(request.columns), len(item.columns)
    width = num_request + num_item
    # Where a field stands among its own side's fields; negative for a field of the item side.
    place = {column: p for p, column in enumerate(request.columns)} | {column: -1 - p for p, column in enumerate(item.columns)}
    once_columns: list[int] = []
    item_columns: list[int] = []
    cross = False
    blocks: list[tuple[str, int]] = []
    for cell in index_P.tolist():
        first, second = place[cell // width], place[cell % width]
        if first >= 0 and second >= 0:
            blocks.append(("request", len(once_columns)))
            once_columns.append(first * num_request + second)
        elif first < 0 and second < 0:
            blocks.append(("item", len(item_columns)))
            item_columns.append((-1 - first) * num_item + (-1 - second))
        else:
            cross = True
            blocks.append(("cross", (-1 - min(first, second)) * num_request + max(first, second)))
    if not once_columns:
        return False
    with editor.before(node):
        x = join(editor, request.nodes, 1)
        y = join(editor, item.nodes, 1)
        parts = {"request": expand(editor, _gram(editor, x, once_columns))}
        if cross:
            parts["cross"] = _flat(editor, editor.call(aten.bmm.default, y, editor.call(aten.transpose.int, expand(editor, x), 1, 2)))
        if item_columns:
            parts["item"] = _gram(editor, y, item_columns)
        widths = [editor.shape(part)[1] for part in parts.values()]
        starts = {name: sum(widths[:p]) for p, name in enumerate(parts)}
        order = torch.tensor([starts[name] + column for name, column in blocks])
        new = join(editor, tuple(parts.values()), 1)
        editor.replace(node, _columns(editor, new, order))
    return True


def _flat(editor: Editor, node: fx.Node) -> fx.Node:
    return editor.call(aten.flatten.using_ints, node, 1)


def _gram(editor: Editor, node: fx.Node, columns: list[int]) -> fx.Node:
    gram = editor.call(aten.bmm.default, node, editor.call(aten.transpose.int, node, 1, 2))
    return _columns(editor, _flat(editor, gram), torch.tensor(columns))


def _columns(editor: Editor, node: fx.Node, columns: Tensor) -> fx.Node:
    if torch.equal(columns, torch.arange(editor.shape(node)[1])):
        return node
    return editor.call(aten.index_select.default, node, 1, editor.store("dot.columns", columns))
