"""Activations of the form x (base + slope sigmoid(shift + scale x)) as one operator: Dice, as the affine pass leaves it.

    addcmul(shift, x, scale) -> sigmoid -> addcmul(base, ., slope) -> mul(x, .)      becomes      sigmoid_gate(x, ...)

Four passes over the tensor become one; where the value came from bfloat16 or goes to it, the conversion is part of it.
"""

from typing import Any

import torch
from torch import fx

from ninerank.fusion.backends.weights import constant_of
from ninerank.fusion.kernels import sigmoid_gate

__all__ = ["absorb_conversions", "fuse_gates"]

aten = torch.ops.aten

GATE = sigmoid_gate.OPERATOR


def fuse_gates(module: fx.GraphModule) -> int:
    """Turn such activations into one operator each, in place; returns how many."""
    fused = 0
    for node in list(module.graph.nodes):
        found = _match(module, node)
        if found is not None:
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_function(GATE, found))
            fused += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return fused


def absorb_conversions(graph: fx.Graph) -> None:
    """Let gates read bfloat16 that was widened for them, and write bfloat16 that would be narrowed behind them."""
    for node in list(graph.nodes):
        if node.target is not GATE:
            continue
        arguments: Any = node.args
        source, *vectors = arguments[:5]
        if source.target is aten.to.dtype and source.args[1] is torch.float32 and len(source.users) == 1:
            source = source.args[0]
        users = list(node.users)
        narrows = bool(users) and all(user.target is aten.to.dtype and user.args[1] is torch.bfloat16 for user in users)
        node.args = (source, *vectors, narrows)
        for user in users if narrows else ():
            user.replace_all_uses_with(node)
    graph.eliminate_dead_code()


def _match(module: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    if node.target is not aten.mul.Tensor or node.kwargs:
        return None
    factors: tuple[Any, ...] = node.args
    for x, outer in (factors, factors[::-1]):
        parts = _affine(module, outer)
        if parts is None or len(outer.users) != 1:
            continue
        base, sigmoid, slope = parts
        if not isinstance(sigmoid, fx.Node) or sigmoid.target is not aten.sigmoid.default or len(sigmoid.users) != 1:
            continue
        argument: Any = sigmoid.args[0]
        inner = _affine(module, argument)
        if inner is not None and inner[1] is x and len(argument.users) == 1:
            return x, inner[0], inner[2], base, slope
    return None


def _affine(module: fx.GraphModule, node: Any) -> tuple[Any, Any, Any] | None:
    """(a, x, b) of a + x b, where a and b are weights with one number a column of x."""
    if not isinstance(node, fx.Node) or node.target is not aten.addcmul.default or node.kwargs or len(node.args) != 3:
        return None
    arguments: Any = node.args
    a, x, b = arguments
    shift, scale = constant_of(module, a), constant_of(module, b)
    if shift is None or scale is None or shift.dim() != 1 or shift.shape != scale.shape:
        return None
    return (a, x, b) if shift.dtype == scale.dtype == torch.float32 else None
