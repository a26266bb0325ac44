"""Constant folding: what follows from weights alone is computed now, and what does nothing is left out.

pattern   y = f(weights);  dropout in evaluation, a type that a tensor has already, a slice of everything, an expansion to the
          same shape, an empty part of a concatenation, a concatenation of one part;  x.view(rows, -1)
rewrite   y is a weight;  the operator's input stands for its output;  flatten(x, 1), which needs no size
right     weights of a bundle never change; the others return their input, or what they returned
pays      always
"""

import math
from typing import Any

import torch
from torch import fx

from ninerank.fusion.editor import Editor, is_random

__all__ = ["apply"]

aten = torch.ops.aten
MAX_FOLDED_BYTES = 64 << 20
MAX_INT = 2**63 - 1  # the end of a slice that has none


def apply(editor: Editor) -> int:
    fired = 0
    for node in editor.calls():
        if node._erased:
            continue
        fired += _without_effect(editor, node) or _folded(editor, node)
    return fired


def _folded(editor: Editor, node: fx.Node) -> bool:
    """Evaluate a call whose tensors are all weights; a view, or something huge, is left as it is where it would only cost memory."""
    value = node.meta["val"]
    weights = [editor.constant(other) for other in node.all_input_nodes]
    if not isinstance(value, torch.Tensor) or any(weight is None for weight in weights):
        return False
    if not weights or is_random(node) or value.numel() * value.element_size() > MAX_FOLDED_BYTES:
        return False
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), editor.constant)
    with torch.no_grad():
        computed = target(*args, **kwargs)
    with editor.before(node):
        editor.replace(node, editor.store(f"folded.{node.name}", computed))
    return True


def _without_effect(editor: Editor, node: fx.Node) -> bool:
    source = _passed_on(editor, node)
    if source is not None:
        editor.replace(node, source)
        return True
    if node.target is aten.cat.default:
        return _emptied(editor, node)
    return node.target in (aten.view.default, aten.reshape.default) and _flattened(editor, node)


def _flattened(editor: Editor, node: fx.Node) -> bool:
    """x.view(rows, -1) and the like -> flatten(x, 1)."""
    before, after = editor.shape(node.args[0]), editor.shape(node)
    if len(before) < 3 or after != (before[0], math.prod(before[1:])) or before[0] not in (editor.rows, editor.requests):
        return False
    with editor.before(node):
        editor.replace(node, editor.call(aten.flatten.using_ints, node.args[0], 1))
    return True


def _passed_on(editor: Editor, node: fx.Node) -> fx.Node | None:
    """The argument that the call returns as it is."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, target = node.args[0], node.target
    same_shape = editor.shape(source) == editor.shape(node)
    if target is aten.dropout.default and node.args[2:] == (False,):
        return source
    if target is aten.to.dtype and len(node.args) == 2 and not node.kwargs and source.meta["val"].dtype == node.args[1]:
        return source
    if target in (aten.expand.default, aten.expand_as.default, aten.alias.default, aten.detach.default) and same_shape:
        return source
    if target is aten.slice.Tensor and _takes_all(editor, node):
        return source
    return None


def _takes_all(editor: Editor, node: fx.Node) -> bool:
    """Whether a slice begins at 0, ends nowhere and leaves nothing out."""
    found: list[Any] = [node.args[place] if len(node.args) > place else default for place, default in ((2, None), (3, None), (4, 1))]
    start, end, step = found
    return start in (None, 0) and (end is None or (isinstance(end, int) and end >= MAX_INT)) and step == 1


def _emptied(editor: Editor, node: fx.Node) -> bool:
    parts: Any = node.args[0]
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    kept = [part for part in parts if 0 not in editor.shape(part)] if 0 not in editor.shape(node) else list(parts)
    if len(kept) == 1 and editor.shape(kept[0]) == editor.shape(node) and kept[0].meta["val"].dtype == node.meta["val"].dtype:
        editor.replace(node, kept[0])
        return True
    if len(kept) == len(parts) or not kept or any(part.meta["val"].dtype != node.meta["val"].dtype for part in parts):
        return False
    with editor.before(node):
        editor.replace(node, editor.call(aten.cat.default, kept, dim))
    return True
