"""The seam between a dynamic table and whatever updates its rows.

A rule says which state it keeps per row, and updates the named rows in place. The table owns the arrays: state is reset when a row
is given to another id, and moves with the row in checkpoints. A fused operator fits as it is: merged storage, row numbers, gradients.

Shape legend: V rows of the storage, K touched rows, D embedding dim, W width of a state.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ninerank.embedding.optimizer import SparseOptimizerConfig

__all__ = ["SparseRule", "StateSpec", "UpdateRule"]


class StateSpec(NamedTuple):
    """One float32 state array (V, width), `fill` in the rows of new ids."""

    width: int
    fill: float


class UpdateRule(Protocol):
    """What a dynamic table asks of an optimizer."""

    def states(self, dim: int) -> Mapping[str, StateSpec]:
        """Name and shape of the state kept beside rows of `dim` values."""

    def apply(self, values_VD: Tensor, states: Mapping[str, Tensor], row_K: Tensor, grad_KD: Tensor, lr_scale: float) -> None:
        """Update rows `row_K` (int64, rising, distinct, none of them 0) in place from their summed gradients; touch no other row."""


class SparseRule:
    """SGD, Adagrad or row-wise Adagrad with the arithmetic, bit for bit, of `SparseOptimizer` on static tables."""

    def __init__(self, config: SparseOptimizerConfig, table: str) -> None:
        self.config = config
        self.lr = config.table_lr.get(table, config.lr)

    def states(self, dim: int) -> Mapping[str, StateSpec]:
        if self.config.kind == "sgd":
            return {}
        return {"sum": StateSpec(dim if self.config.kind == "adagrad" else 1, self.config.initial_accumulator)}

    @torch.no_grad()
    def apply(self, values_VD: Tensor, states: Mapping[str, Tensor], row_K: Tensor, grad_KD: Tensor, lr_scale: float) -> None:
        weight_KD = values_VD.index_select(0, row_K)
        if self.config.weight_decay:
            grad_KD = grad_KD.add(weight_KD, alpha=self.config.weight_decay)
        delta_KD = grad_KD
        if states:
            sum_VW = states["sum"]
            square_KD = grad_KD.square()
            sum_KW = sum_VW.index_select(0, row_K) + (square_KD if self.config.kind == "adagrad" else square_KD.mean(1, keepdim=True))
            sum_VW.index_copy_(0, row_K, sum_KW)
            delta_KD = grad_KD / (sum_KW.sqrt() + self.config.eps)
        values_VD.index_copy_(0, row_K, weight_KD - delta_KD * (self.lr * lr_scale))
