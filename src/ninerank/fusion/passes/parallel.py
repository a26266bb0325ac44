"""Towers and experts of one shape, side by side, as batched products.

pattern   f(p_1), f(p_2), ...      p_e all values that lie side by side in one tensor, f one of
              an operator element by element, with constants of each or none; a softmax; a Linear with weights of each, all of one shape;
              bmm(p_e[:, None], X) with one X: gates of several tasks that mix the same experts
          stack([p_1, p_2, ...], 1) and cat([p_1, p_2, ...], 1), of all values in order
rewrite   f of the whole tensor with the constants side by side; a Linear as baddbmm(b, p, W) over E matrices;  the tensor itself
right     no value depends on another one, and batched products are E products
pays      one launch in place of E, and products of a size that fills the device: E experts of two layers are two launches

What `siblings` made one Linear is where it begins; deeper layers follow round by round. Shape legend: B rows, E values side by side,
I width of each, H of a result.
"""

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from ninerank.fusion.editor import Editor
from ninerank.fusion.rowwise import POINTWISE, axis
from ninerank.fusion.stacks import Stack, part_of

__all__ = ["apply"]

aten = torch.ops.aten
_ELEMENTWISE = POINTWISE | {aten.prelu.default}


def apply(editor: Editor) -> int:
    fired = 0
    while changed := _round(editor):
        fired += changed
    return fired


def _round(editor: Editor) -> int:
    fired = 0
    for node in editor.calls(aten.stack.default, aten.cat.default):
        fired += _joined(editor, node)
    groups: dict[Hashable, dict[int, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    for node in editor.calls():
        found = _form(editor, node)
        if found is not None:
            key, place = found
            groups[key][place].append(node)
    for places in groups.values():
        nodes = [places[place] for place in sorted(places)]
        if all(node._erased is False for same in nodes for node in same):
            fired += _batched(editor, nodes)
    return fired


def _form(editor: Editor, node: fx.Node) -> tuple[Hashable, int] | None:
    """What calls have in common that do the same with every value of a stack, and whose place this call's value is."""
    if node.target is aten.bmm.default:
        left = node.args[0]
        is_row = isinstance(left, fx.Node) and left.target is aten.unsqueeze.default and axis(left.args[1], 3) == 1
        found = part_of(editor, left.args[0]) if is_row and isinstance(left, fx.Node) else None
        return None if found is None else ((node.target, found[0], node.args[1]), found[1])
    if node.target is aten.softmax.int and node.kwargs == {} and len(node.args) <= 3 and axis(node.args[1], 2) == 1:
        found = part_of(editor, node.args[0])
        return None if found is None else ((node.target, found[0], node.args[2:]), found[1])
    if node.target is aten.linear.default:
        found, weights = part_of(editor, node.args[0]), [editor.constant(arg) for arg in node.args[1:] if arg is not None]
        if found is None or any(weight is None for weight in weights):
            return None
        return (node.target, found[0], tuple(tuple(weight.shape) for weight in weights if weight is not None)), found[1]
    return _elementwise_form(editor, node) if node.target in _ELEMENTWISE and editor.rank(node) == 2 else None


def _elementwise_form(editor: Editor, node: fx.Node) -> tuple[Hashable, int] | None:
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    signature: list[Hashable] = [node.target, tuple((key, str(value)) for key, value in node.kwargs.items())]
    places: set[int] = set()
    for arg in node.args:
        found, weight = part_of(editor, arg), editor.constant(arg)
        if found is not None:
            signature.append(found[0])
            places.add(found[1])
        elif weight is not None:
            if weight.dim() > 1 or weight.numel() not in (1, editor.shape(node)[1]):
                return None
            signature.append("constant")
        elif isinstance(arg, fx.Node):
            return None
        else:
            signature.append(f"{type(arg).__name__} {arg}")
    return (tuple(signature), places.pop()) if len(places) == 1 else None


def _batched(editor: Editor, nodes: list[list[fx.Node]]) -> bool:
    """Make one call of those that do the same with every value of a stack; nodes: calls by place."""
    first = next(node for node in editor.graph.nodes if any(node in same for same in nodes))
    found = next(known for arg in first.all_input_nodes for known in (part_of(editor, arg), _row_of(editor, arg)) if known is not None)
    stack = found[0]
    if len(nodes) != stack.count:
        return False
    each = [same[0] for same in nodes]
    with editor.before(first):
        if first.target is aten.bmm.default:
            mixed = Stack(editor.call(aten.bmm.default, stack.second(editor), first.args[1]), "second", stack.count)
            parts = [editor.call(aten.unsqueeze.default, mixed.part(editor, place), 1) for place in range(stack.count)]
        else:
            whole = _whole(editor, each, stack)
            if whole is None:
                return False
            parts = [whole.part(editor, place) for place in range(stack.count)]
    for same, part in zip(nodes, parts, strict=True):
        for node in same:
            _replace(editor, node, part)
    return True


def _row_of(editor: Editor, node: fx.Node) -> tuple[Stack, int] | None:
    """The stack whose value `node` is, as one row of a product."""
    return part_of(editor, node.args[0]) if node.target is aten.unsqueeze.default else None


def _replace(editor: Editor, node: fx.Node, part: fx.Node) -> None:
    """Let readers of `node` read `part`; a squeeze of what was unsqueezed is gone."""
    if part.target is aten.unsqueeze.default:
        for user in list(node.users):
            if user.target is aten.squeeze.dim and axis(user.args[1], 3) == 1:
                editor.replace(user, part.args[0])  # type: ignore[arg-type]
    if not node._erased:
        editor.replace(node, part)


def _whole(editor: Editor, each: list[fx.Node], stack: Stack) -> Stack | None:
    first = each[0]
    if first.target is aten.softmax.int:
        layout = "second" if stack.layout == "columns" else stack.layout
        source = stack.second(editor) if stack.layout == "columns" else stack.whole
        return Stack(editor.call(aten.softmax.int, source, 2, *first.args[2:]), layout, stack.count)
    if first.target is aten.linear.default:
        return _products(editor, each, stack)
    if first.target is aten.prelu.default:
        return _prelu(editor, each, stack)
    args = [_whole_argument(editor, each, place, stack) for place in range(len(first.args))]
    return Stack(editor.call(first.target, *args, **first.kwargs), stack.layout, stack.count)


def _whole_argument(editor: Editor, each: list[fx.Node], place: int, stack: Stack) -> Any:
    arg = each[0].args[place]
    found = part_of(editor, arg)
    if found is not None:
        return found[0].whole
    if editor.constant(arg) is None:
        return arg
    weight_EH = torch.stack([vector.expand(editor.shape(each[0])[1]) for vector in _constants(editor, each, place)])
    shaped = {"columns": weight_EH.flatten(), "second": weight_EH, "first": weight_EH.unsqueeze(1)}[stack.layout]
    return editor.store(f"parallel.{each[0].name}.{place}", shaped)


def _constants(editor: Editor, each: list[fx.Node], place: int) -> list[Tensor]:
    return [tensor for node in each if (tensor := editor.constant(node.args[place])) is not None]


def _products(editor: Editor, each: list[fx.Node], stack: Stack) -> Stack:
    name = f"parallel.{each[0].name}"
    weight = editor.store(f"{name}.weight", torch.stack([weight_HI.T for weight_HI in _constants(editor, each, 1)]))
    source = stack.first(editor)
    if len(each[0].args) > 2 and each[0].args[2] is not None:
        bias = editor.store(f"{name}.bias", torch.stack(_constants(editor, each, 2)).unsqueeze(1))
        return Stack(editor.call(aten.baddbmm.default, bias, source, weight), "first", stack.count)
    return Stack(editor.call(aten.bmm.default, source, weight), "first", stack.count)


def _prelu(editor: Editor, each: list[fx.Node], stack: Stack) -> Stack | None:
    """PReLU takes a weight of the second dimension: of columns, or of values that have one weight each."""
    weights = _constants(editor, each, 1)
    name = f"parallel.{each[0].name}.weight"
    if stack.layout == "columns":
        vectors = [weight.reshape(-1).expand(stack.width(editor)) for weight in weights]
        return Stack(editor.call(aten.prelu.default, stack.whole, editor.store(name, torch.cat(vectors))), "columns", stack.count)
    if any(weight.numel() != 1 for weight in weights):
        return None
    own = editor.store(name, torch.cat([weight.reshape(1) for weight in weights]))
    return Stack(editor.call(aten.prelu.default, stack.second(editor), own), "second", stack.count)


def _joined(editor: Editor, node: fx.Node) -> bool:
    """stack or cat of all values of a stack, in order, along the second dimension."""
    parts: Any = node.args[0]
    found = [part_of(editor, part) for part in parts]
    dim = node.args[1] if len(node.args) > 1 else 0
    if not found or found[0] is None or axis(dim, editor.rank(node)) != 1:
        return False
    stack = found[0][0]
    if stack.count != len(found) or any(known != (stack, place) for place, known in enumerate(found)):
        return False
    with editor.before(node):
        editor.replace(node, stack.second(editor) if node.target is aten.stack.default else stack.columns(editor))
    return True
