"""Bilinear pairs of fields: pairs of two request fields once a request, and the matrices of request fields too.

pattern   (v_l W) * v_r over pairs (l, r) of v = cat([x[user_row], y]) over fields, one W, one per l or one per pair
rewrite   cat of [((x W) * x)[user_row], (x W)[user_row] * y, (y W) * x[user_row], (y W) * y] over the pairs of each kind;
          the order of the pairs goes with the columns of what flattens them, from where the Linear behind takes it into its weight
right     a pair is a function of its two fields
pays      where the request has several fields: with Fu of them Fu (Fu - 1) / 2 pairs, and their share of the Linear, leave the candidates

Huang et al., FiBiNET, RecSys 2019.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ninerank.fusion.concat import Concat, concat_of, expand, is_mixed, join, sides_of
from ninerank.fusion.editor import Editor
from ninerank.fusion.rowwise import axis

__all__ = ["apply"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Pairs:
    """v_l times a matrix, times v_r. matrix: which of the weights each pair takes; None where there is but one."""

    fields: fx.Node
    left: tuple[int, ...]
    right: tuple[int, ...]
    weight: Tensor
    matrix: tuple[int, ...] | None


def apply(editor: Editor) -> int:
    return sum(_split(editor, node) for node in editor.calls(aten.mul.Tensor))


def _split(editor: Editor, node: fx.Node) -> bool:
    pairs = next((p for args in (node.args, node.args[::-1]) if (p := _read(editor, *args)) is not None), None) if not node.kwargs else None
    concat = None if pairs is None else concat_of(editor, pairs.fields)
    if pairs is None or concat is None or concat.dim != 1 or not is_mixed(concat):
        return False
    with editor.before(node):
        blocks, order = _blocks(editor, node, pairs, concat)
    if not _flattened(editor, node, blocks, order):
        with editor.before(node):
            whole = join(editor, tuple(blocks), 1)
            editor.replace(node, editor.call(aten.index_select.default, whole, 1, editor.store(f"bilinear.{node.name}.order", order)))
    return True


def _read(editor: Editor, turned: object, right: object) -> _Pairs | None:
    """The pairs where `turned` is v_l W and `right` is v_r."""
    chosen = _chosen(editor, right)
    if chosen is None or not isinstance(turned, fx.Node):
        return None
    fields, right_P = chosen
    inner = _chosen(editor, turned)
    if inner is None:  # one matrix per pair
        product = _swapped(turned)
        chosen = _chosen(editor, _swapped(product.args[0])) if product is not None and product.target is aten.bmm.default else None
        weight = None if product is None else editor.constant(product.args[1])
        if chosen is None or weight is None or chosen[0] is not fields:
            return None
        return _Pairs(fields, chosen[1], right_P, weight, tuple(range(len(right_P))))
    product, left_P = inner
    if product.target is aten.matmul.default and _is_start_of(editor, product.args[0], fields):
        weight = editor.constant(product.args[1])
        return None if weight is None or weight.dim() != 2 else _Pairs(fields, left_P, right_P, weight, None)
    swapped = _swapped(product)
    if swapped is not None and swapped.target is aten.bmm.default and _is_start_of(editor, _swapped(swapped.args[0]), fields):
        weight = editor.constant(swapped.args[1])
        return None if weight is None else _Pairs(fields, left_P, right_P, weight, left_P)
    return None


def _chosen(editor: Editor, node: object) -> tuple[fx.Node, tuple[int, ...]] | None:
    """v and the places where `node` is index_select(v, 1, places)."""
    if not isinstance(node, fx.Node) or node.target is not aten.index_select.default or node.args[1] != 1 or editor.rank(node) != 3:
        return None
    index = editor.constant(node.args[2])
    assert isinstance(node.args[0], fx.Node)
    return None if index is None else (node.args[0], tuple(index.tolist()))


def _swapped(node: object) -> fx.Node | None:
    """x where `node` is x with its first two of three dimensions swapped."""
    if not isinstance(node, fx.Node) or node.target is not aten.transpose.int:
        return None
    source = node.args[0]
    return source if {axis(node.args[1], 3), axis(node.args[2], 3)} == {0, 1} and isinstance(source, fx.Node) else None


def _is_start_of(editor: Editor, node: object, fields: fx.Node) -> bool:
    """Whether `node` is `fields` or their first ones."""
    if not isinstance(node, fx.Node) or node is fields:
        return node is fields
    if node.target is not aten.slice.Tensor or node.args[0] is not fields or len(node.args) != 4:
        return False
    return bool(node.args[1] == 1 and node.args[2] in (0, None))


def _blocks(editor: Editor, node: fx.Node, pairs: _Pairs, concat: Concat) -> tuple[list[fx.Node], Tensor]:
    """Products of the pairs by the sides of their fields, and the place of each pair among them."""
    sides = sides_of(concat)
    once = {column: place for place, column in enumerate(sides[0].columns)}
    each = {column: place for place, column in enumerate(sides[1].columns)}
    values = [join(editor, side.nodes, 1) for side in sides]
    blocks: list[fx.Node] = []
    placed: list[int] = []
    for first, of_left in enumerate((once, each)):
        groups = [
            [p for p, (a, b) in enumerate(zip(pairs.left, pairs.right, strict=True)) if a in of_left and b in o] for o in (once, each)
        ]
        if not any(groups):
            continue
        turned = _turned(editor, node, pairs, [p for group in groups for p in group], of_left, values[first])
        start = 0
        for second, (of_right, group) in enumerate(zip((once, each), groups, strict=True)):
            if not group:
                continue
            left = editor.call(aten.slice.Tensor, turned, 1, start, start + len(group))
            right = _picked(editor, node, values[second], [of_right[pairs.right[p]] for p in group])
            start += len(group)
            placed += group
            if first == second:
                product = editor.call(aten.mul.Tensor, left, right)
                blocks.append(product if first else expand(editor, product))
            else:
                left, right = (left, expand(editor, right)) if first else (expand(editor, left), right)
                blocks.append(editor.call(aten.mul.Tensor, left, right))
    return blocks, torch.tensor(placed).argsort()


def _turned(editor: Editor, node: fx.Node, pairs: _Pairs, group: list[int], of_left: dict[int, int], value: fx.Node) -> fx.Node:
    """v_l W for the pairs of a group, in their order: (rows, P, D)."""
    places = [of_left[pairs.left[p]] for p in group]
    name = f"bilinear.{node.name}.weight"
    if pairs.matrix is None:
        return _picked(editor, node, editor.call(aten.matmul.default, value, editor.store(name, pairs.weight)), places)
    matrices = {(place, pairs.matrix[p]): None for place, p in zip(places, group, strict=True)}
    of_fields = _picked(editor, node, value, [place for place, _ in matrices])
    weight = editor.store(name, pairs.weight[[matrix for _, matrix in matrices]])
    product = editor.call(aten.bmm.default, editor.call(aten.transpose.int, of_fields, 0, 1), weight)
    turned = editor.call(aten.transpose.int, product, 0, 1)
    numbers = {key: number for number, key in enumerate(matrices)}
    return _picked(editor, node, turned, [numbers[place, pairs.matrix[p]] for place, p in zip(places, group, strict=True)])


def _picked(editor: Editor, node: fx.Node, value: fx.Node, places: list[int]) -> fx.Node:
    if places == list(range(editor.shape(value)[1])):
        return value
    return editor.call(aten.index_select.default, value, 1, editor.store(f"bilinear.{node.name}.fields", torch.tensor(places)))


def _flattened(editor: Editor, node: fx.Node, blocks: list[fx.Node], order: Tensor) -> bool:
    """Give what flattens the pairs, alone or side by side with others, flat blocks and columns in order."""
    if not node.users:
        return False
    (reader, *others) = node.users
    parts: list[fx.Node] = [node]
    if reader.target is aten.cat.default and len(reader.users) == 1:
        concat = concat_of(editor, reader)
        if concat is None or concat.dim != 1:
            return False
        parts, (reader,) = list(concat.parts), reader.users
    if others or reader.target is not aten.flatten.using_ints or reader.args[1:] not in ((1,), (1, -1), (1, 2)):
        return False
    dim = editor.shape(node)[2]
    columns = (order[:, None] * dim + torch.arange(dim)).flatten()
    with editor.before(reader):
        flat = join(editor, tuple(editor.call(aten.flatten.using_ints, block, 1) for block in blocks), 1)
        own = editor.call(aten.index_select.default, flat, 1, editor.store(f"bilinear.{node.name}.order", columns))
        whole = [own if part is node else editor.call(aten.flatten.using_ints, part, 1) for part in parts]
        editor.replace(reader, join(editor, tuple(whole), 1))
    return True
