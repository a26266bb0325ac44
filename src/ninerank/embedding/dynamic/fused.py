"""Update of a dynamic table's rows by the fused operator: duplicates are summed, clipped and applied in one pass over each row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ninerank.embedding.dynamic.gather import OwnRowGradients
from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_update import RowOptimizer, embedding_update

__all__ = ["FusedRule"]


class FusedRule:
    """Any row optimizer of `fusion.kernels.embedding_update`: SGD, Adagrad, row-wise Adagrad, lazy Adam, FTRL.

    lr: learning rate; `update(lr_scale)` multiplies it. kernel: by name, or the best one here. FTRL's state depends on the learning rate:
    keep lr_scale at 1 with it.
    """

    def __init__(self, optimizer: RowOptimizer, lr: float, *, kernel: str = registry.AUTO) -> None:
        self.optimizer, self.lr, self.kernel = optimizer, lr, kernel
        self._first_row_T = torch.zeros(1, dtype=torch.int64)

    def new_state(self, values_KD: Tensor) -> dict[str, Tensor]:
        states = self.optimizer.new_state(values_KD, torch.tensor([self.lr]))
        return dict(zip(self.optimizer.state_names, states, strict=True))

    def apply(self, values_VD: Tensor, states: Mapping[str, Tensor], gradients: OwnRowGradients, lr_scale: float) -> None:
        pairs = gradients.pairs()
        if pairs is None:
            return
        row_N, grad_ND = pairs
        lr_T = torch.tensor([self.lr * lr_scale])
        state = [states[name] for name in self.optimizer.state_names]
        embedding_update(values_VD, state, grad_ND, row_N, self._first_row_T, lr_T, self.optimizer, kernel=self.kernel)
