"""How far two results of an operator lie apart, in all and as a share of their size."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["Difference", "difference"]

# A value that stands for "not there" tells nothing of a tensor's size.
MASKED = 1e8
LEAST_SIZE = 1e-6


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference, and largest relative to the largest value of its tensor; infinite for other shapes, types and nan."""

    absolute: float = 0.0
    relative: float = 0.0

    def __or__(self, other: "Difference") -> "Difference":
        return Difference(max(self.absolute, other.absolute), max(self.relative, other.relative))


def difference(first: Any, second: Any) -> Difference:
    """How far two results of an operator lie apart; they may lie on different devices."""
    (mine, tree), (theirs, other_tree) = tree_flatten(first), tree_flatten(second)
    if tree != other_tree:
        return Difference(math.inf, math.inf)
    found = Difference()
    for one, other in zip(mine, theirs, strict=True):
        found |= _apart(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else _exactly(bool(one == other))
    return found


def _exactly(is_same: bool) -> Difference:
    return Difference() if is_same else Difference(math.inf, math.inf)


def _apart(first: Tensor, second: Tensor) -> Difference:
    if first.shape != second.shape or first.is_floating_point() != second.is_floating_point():
        return _exactly(False)
    if not first.is_floating_point():
        return _exactly(torch.equal(first.cpu(), second.cpu()))
    if first.numel() == 0:
        return Difference()
    mine, theirs = (tensor.to("cpu", torch.float64) for tensor in (first, second))
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    apart = torch.where(same, 0.0, (mine - theirs).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    size = mine.abs().nan_to_num(nan=0.0)
    # What is masked is compared with itself alone: beside it everything else would look small.
    scale = torch.where(size < MASKED, torch.where(size < MASKED, size, 0.0).max().clamp(min=LEAST_SIZE), size)
    return Difference(float(apart.max()), float((apart / scale).nan_to_num(nan=math.inf, posinf=math.inf).max()))
