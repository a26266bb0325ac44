"""The seam between a dynamic table and the fused operator that updates its rows.

The rule says which state a row starts with, and updates rows in place from the gradients that backward passes left. The table owns
the arrays: a row that is given to another id starts afresh, and state moves with its row in checkpoints.

Shape legend: V rows in use, K rows, D embedding dim.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ninerank.embedding.pending import PendingGradients
from ninerank.fusion.kernels.embedding_update import RowOptimizer

__all__ = ["FusedRule"]


class FusedRule:
    """Any row optimizer of `fusion.kernels.embedding_update`: SGD, Adagrad, row-wise Adagrad, lazy Adam, FTRL.

    lr: learning rate; `update(lr_scale)` multiplies it. FTRL's state depends on the learning rate: keep lr_scale at 1 with it.
    """

    def __init__(self, optimizer: RowOptimizer, lr: float) -> None:
        self.optimizer, self.lr = optimizer, lr
        self._first_row_T = torch.zeros(1, dtype=torch.int64)

    def new_state(self, values_KD: Tensor) -> dict[str, Tensor]:
        """State (K,) or (K, D) of rows that start from these values, by name; the same names and types for any K, 0 among them."""
        states = self.optimizer.new_state(values_KD, torch.tensor([self.lr]))
        return dict(zip(self.optimizer.state_names, states, strict=True))

    def apply(self, values_VD: Tensor, states: Mapping[str, Tensor], gradients: PendingGradients, lr_scale: float) -> None:
        """Update the rows that have gradients in place, duplicates summed once before; touch no other row."""
        state = [states[name] for name in self.optimizer.state_names]
        gradients.apply(values_VD, state, self._first_row_T, torch.tensor([self.lr * lr_scale]), self.optimizer)
