"""The seam between a dynamic table and whatever updates its rows.

A rule says which state a row starts with, and updates rows in place from the gradients that backward passes left. The table owns the
arrays: a row that is given to another id starts afresh, and state moves with its row in checkpoints.

Shape legend: V rows in use, K rows, N looked-up ids, D embedding dim, W width of a state.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ninerank.embedding.dynamic.gather import OwnRowGradients
from ninerank.embedding.optimizer import SparseOptimizerConfig

__all__ = ["SparseRule", "UpdateRule"]


class UpdateRule(Protocol):
    """What a dynamic table asks of an optimizer."""

    def new_state(self, values_KD: Tensor) -> dict[str, Tensor]:
        """State (K,) or (K, W) of rows that start from these values, by name; the same names and types for any K, 0 among them."""

    def apply(self, values_VD: Tensor, states: Mapping[str, Tensor], gradients: OwnRowGradients, lr_scale: float) -> None:
        """Update the rows that have gradients in place, duplicates summed once before; touch no other row."""


class SparseRule:
    """SGD, Adagrad or row-wise Adagrad in plain torch, with the arithmetic of `SparseOptimizer` on static tables."""

    def __init__(self, config: SparseOptimizerConfig, table: str) -> None:
        self.config = config
        self.lr = config.table_lr.get(table, config.lr)

    def new_state(self, values_KD: Tensor) -> dict[str, Tensor]:
        if self.config.kind == "sgd":
            return {}
        rows, dim = values_KD.shape
        return {"sum": torch.full((rows, dim if self.config.kind == "adagrad" else 1), self.config.initial_accumulator)}

    @torch.no_grad()
    def apply(self, values_VD: Tensor, states: Mapping[str, Tensor], gradients: OwnRowGradients, lr_scale: float) -> None:
        merged = gradients.merged()
        if merged is None:
            return
        row_K, grad_KD = merged
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
