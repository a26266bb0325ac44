"""Linears of one shape over one input as one Linear.

pattern   linear(x, W_1, b_1), linear(x, W_2, b_2), ...         x (B, I), all of one shape: experts, gates, towers
rewrite   y = linear(x, [W_1; W_2; ...], [b_1, b_2, ...]),      and columns of y in place of each
right     a Linear's outputs do not depend on each other
pays      always: x is read once, one launch in place of many, and what splits or keeps one Linear does so for all

The projections of an attention over fields, x (B, F, D), are left alone: their products copy what does not lie together, and AutoInt
was slower by a tenth.
"""

from collections import defaultdict
from collections.abc import Hashable

import torch
from torch import Tensor, fx

from ninerank.fusion.editor import Editor
from ninerank.fusion.stacks import Stack

__all__ = ["apply"]

aten = torch.ops.aten


def apply(editor: Editor) -> int:
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    for node in editor.calls(aten.linear.default):
        weight_HI = editor.constant(node.args[1])
        bias = node.args[2] if len(node.args) > 2 else None
        if editor.rank(node) == 2 and weight_HI is not None and (bias is None or editor.constant(bias) is not None):
            groups[node.args[0], tuple(weight_HI.shape), weight_HI.dtype, bias is None].append(node)
    return sum(_merge(editor, nodes) for nodes in groups.values() if len(nodes) > 1)


def _merge(editor: Editor, nodes: list[fx.Node]) -> bool:
    first = nodes[0]

    def joined(place: int) -> fx.Node:
        tensors = [tensor for node in nodes if isinstance(tensor := editor.constant(node.args[place]), Tensor)]
        return editor.store(f"siblings.{first.name}.{('weight', 'bias')[place - 1]}", torch.cat(tensors))

    has_bias = len(first.args) > 2 and first.args[2] is not None
    with editor.before(first):
        whole = editor.call(aten.linear.default, first.args[0], joined(1), *([joined(2)] if has_bias else []))
        stack = Stack(whole, "columns", len(nodes))
        parts = [stack.part(editor, place) for place in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        editor.replace(node, part)
    return True
