"""Chains of additions and multiplications with constants as one operator.

pattern   ((x - mean) * scale), p + (1 - p) * alpha, and any other tree of +, -, * with constants over one value x
rewrite   addcmul(t, x, s) = t + s x, with s and t computed now
right     every such tree is s x + t with constant s and t
pays      where two operators or more become one: the normalisation inside a Dice activation, and its blend with alpha, go over
          a layer's output twice instead of five times
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ninerank.fusion.editor import Editor

__all__ = ["apply"]

aten = torch.ops.aten
_TREE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.rsub.Scalar)


@dataclass(frozen=True)
class _Form:
    """scale * base + shift, in double precision; made of `operators`."""

    base: fx.Node
    scale: Tensor
    shift: Tensor
    operators: frozenset[fx.Node] = frozenset()


def apply(editor: Editor) -> int:
    forms: dict[fx.Node, _Form] = {}
    for node in editor.calls(*_TREE):
        form = _form_of(editor, forms, node)
        if form is not None:
            forms[node] = form
    fired = 0
    for node, form in forms.items():
        is_inside = bool(node.users) and all(user in forms and forms[user].base is form.base for user in node.users)
        if not is_inside and len(form.operators) > 1:
            fired += _rewrite(editor, node, form)
    return fired


def _rewrite(editor: Editor, node: fx.Node, form: _Form) -> bool:
    dtype, shape = node.meta["val"].dtype, editor.shape(node)
    if _broadcast(tuple(form.scale.shape), tuple(form.shift.shape), editor.shape(form.base)) != shape:
        return False
    with editor.before(node):
        scale = editor.store(f"affine.{node.name}.scale", form.scale.to(dtype))
        shift = editor.store(f"affine.{node.name}.shift", form.shift.to(dtype))
        editor.replace(node, editor.call(aten.addcmul.default, shift, form.base, scale))
    return True


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _form_of(editor: Editor, forms: dict[fx.Node, _Form], node: fx.Node) -> _Form | None:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or node.kwargs:
        return None
    if node.target is aten.rsub.Scalar:
        inner = _operand(editor, forms, node.args[0])
        number = node.args[1]
        if not isinstance(inner, _Form) or not isinstance(number, (int, float)) or len(node.args) > 2:
            return None
        return _Form(inner.base, -inner.scale, number - inner.shift, inner.operators | {node})
    if len(node.args) != 2:
        return None
    left, right = (_operand(editor, forms, arg) for arg in node.args)
    if left is None or right is None or (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return None
    if node.target is aten.mul.Tensor:
        return _product(node, left, right)
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    return _sum(node, left, right, sign)


def _product(node: fx.Node, left: _Form | Tensor, right: _Form | Tensor) -> _Form | None:
    if isinstance(left, Tensor) and isinstance(right, _Form):
        left, right = right, left
    if isinstance(left, _Form) and isinstance(right, Tensor):
        return _Form(left.base, left.scale * right, left.shift * right, left.operators | {node})
    return None


def _sum(node: fx.Node, left: _Form | Tensor, right: _Form | Tensor, sign: float) -> _Form | None:
    if isinstance(left, Tensor) and isinstance(right, _Form):
        return _Form(right.base, sign * right.scale, left + sign * right.shift, right.operators | {node})
    if isinstance(left, _Form) and isinstance(right, Tensor):
        return _Form(left.base, left.scale, left.shift + sign * right, left.operators | {node})
    assert isinstance(left, _Form)
    assert isinstance(right, _Form)
    if left.base is not right.base:
        return None
    scale, shift = left.scale + sign * right.scale, left.shift + sign * right.shift
    return _Form(left.base, scale, shift, left.operators | right.operators | {node})


def _operand(editor: Editor, forms: dict[fx.Node, _Form], value: object) -> _Form | Tensor | None:
    """An operand as a constant, or as a form over its base; None for what is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, fx.Node):
        return None
    weight = editor.constant(value)
    if weight is not None:
        return weight.double() if weight.dtype.is_floating_point else None
    if value in forms:
        return forms[value]
    held = value.meta["val"]
    if not isinstance(held, Tensor) or not held.dtype.is_floating_point:
        return None
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return _Form(value, one, zero)
