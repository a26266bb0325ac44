"""First layer of target attention: keys of a history are not combined with the target one by one.

    pattern   linear(cat([q, k, q - k, q * k], 2), W, b),   q (B, 1, D) expanded along the history k (B, L, D), in any order and number
    rewrite   baddbmm(q W_q + b, k, W_k + diag(q) W_p),     W_q, W_k, W_p the sums of W's columns that meet q, k and their product
    right     [q, k, q - k, q * k] W = q (W_1 + W_3) + k (W_2 - W_3) + (q * k) W_4, and (q * k) W_4 = k (diag(q) W_4)
    pays      always: 4 D H products a key become D H, q's share is computed once a candidate, neither q - k nor q * k nor the
              concatenation exist in memory, and the keys of a request need not be repeated for its candidates

Zhou et al., Deep Interest Network, KDD 2018 (equation 3 and its activation unit).
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ninerank.fusion.concat import concat_of
from ninerank.fusion.editor import Editor

__all__ = ["apply"]

aten = torch.ops.aten
_EXPANSIONS = (aten.expand_as.default, aten.expand.default)


@dataclass
class _Terms:
    """W as it meets targets q, keys k, and products of a target with keys; in double precision."""

    targets: dict[fx.Node, Tensor] = field(default_factory=dict)
    keys: dict[fx.Node, Tensor] = field(default_factory=dict)
    products: dict[fx.Node, dict[fx.Node, Tensor]] = field(default_factory=lambda: defaultdict(dict))


def apply(editor: Editor) -> int:
    return sum(_split(editor, node) for node in editor.calls(aten.linear.default))


def _split(editor: Editor, node: fx.Node) -> bool:
    concat, weight_HI = concat_of(editor, node.args[0]), editor.constant(node.args[1])
    if concat is None or weight_HI is None or concat.dim != 2 or editor.rank(node) != 3:
        return False
    bias_H = editor.constant(node.args[2]) if len(node.args) > 2 else None
    if bias_H is None and len(node.args) > 2 and node.args[2] is not None:
        return False
    terms = _Terms()
    for part, start, end in zip(concat.parts, concat.starts[:-1], concat.starts[1:], strict=True):
        if not _read(editor, terms, part, weight_HI[:, start:end].double()):
            return False
    if not terms.targets or not terms.products:
        return False
    dtype = weight_HI.dtype

    def stored(name: str, tensor: Tensor) -> fx.Node:
        return editor.store(f"attention.{node.name}.{name}", tensor.to(dtype))

    with editor.before(node):
        bias = [] if bias_H is None else [node.args[2]]
        shares: list[fx.Node] = []
        for query, weight in terms.targets.items():
            shares.append(editor.call(aten.linear.default, query, stored("query", weight), *([] if shares else bias)))
        whole = shares[0]
        for share in shares[1:]:
            whole = editor.call(aten.add.Tensor, whole, share)
        for keys in dict.fromkeys([*terms.keys, *terms.products]):
            own = terms.keys.get(keys)
            if keys not in terms.products:
                assert own is not None
                whole = editor.call(aten.add.Tensor, editor.call(aten.linear.default, keys, stored("key", own)), whole)
                continue
            first = next(iter(terms.products[keys].values()))
            matrix = stored("key", (torch.zeros_like(first) if own is None else own).T)
            for query, weight in terms.products[keys].items():
                matrix = editor.call(
                    aten.addcmul.default, matrix, editor.call(aten.transpose.int, query, 1, 2), stored("product", weight.T)
                )
            whole = editor.call(aten.baddbmm.default, whole, keys, matrix)
        editor.replace(node, whole)
    return True


def _read(editor: Editor, terms: _Terms, part: fx.Node, weight: Tensor) -> bool:
    """Add one part of the concatenation to the terms; False where it is of another form."""
    query = _target(editor, part)
    if query is not None:
        terms.targets[query] = terms.targets.get(query, 0) + weight
        return True
    if part.target in (aten.sub.Tensor, aten.add.Tensor) and not part.kwargs:
        left, right = part.args[:2]
        sign = -1 if part.target is aten.sub.Tensor else 1
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and editor.rank(left) == editor.rank(right) == 3:
            return _read(editor, terms, left, weight) and _read(editor, terms, right, sign * weight)
    if part.target is aten.mul.Tensor:
        left, right = part.args
        for this, other in ((left, right), (right, left)):
            query = _target(editor, this)
            if query is not None and _target(editor, other) is None and editor.shape(other) == editor.shape(part):
                assert isinstance(other, fx.Node)
                terms.products[other][query] = terms.products[other].get(query, 0) + weight
                return True
    if editor.rank(part) != 3 or part.meta["role"] == "constant":
        return False
    terms.keys[part] = terms.keys.get(part, 0) + weight
    return True


def _target(editor: Editor, node: object) -> fx.Node | None:
    """q (B, 1, D) where `node` is q along a history."""
    if not isinstance(node, fx.Node) or node.target not in _EXPANSIONS:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = editor.shape(source)
    is_target = len(shape) == 3 and shape[1] == 1 and editor.shape(node)[0] == shape[0] and editor.shape(node)[2] == shape[2]
    return source if is_target else None
