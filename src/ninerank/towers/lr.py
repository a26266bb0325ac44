"""Logistic regression: logit = b + sum_f w_f.

Richardson, Dominowska, Ragno, Predicting Clicks, WWW 2007. Ids have weights of their own, numbers enter as x_j w_j, a sequence
as the mean of its ids' weights.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ninerank.towers.blocks.fields import LinearTerm
from ninerank.towers.config import LRConfig
from ninerank.towers.model import TowerShape

__all__ = ["LR"]


class LR(nn.Module):
    """Logits (B, T) from the `linear` group; see the equation above."""

    def __init__(self, config: LRConfig, shape: TowerShape) -> None:
        super().__init__()
        self.linear = LinearTerm(shape)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits_BT: Tensor = self.linear(inputs)
        return logits_BT
