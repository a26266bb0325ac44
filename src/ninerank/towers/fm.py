"""Factorisation machine: logit = b + sum_f w_f + sum_{f < g} <v_f, v_g>.

Rendle, Factorization Machines, ICDM 2010. A number x_j is the field x_j v_j, a sequence the mean of its ids' vectors. With several
tasks each has its own w and b; they share the pairwise term.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ninerank.towers.blocks.fields import FieldStack, LinearTerm
from ninerank.towers.blocks.interaction import FMInteraction
from ninerank.towers.config import FMConfig
from ninerank.towers.model import TowerShape

__all__ = ["FM"]


class FM(nn.Module):
    """Logits (B, T) from the groups `linear` and `deep`; see the equation above."""

    def __init__(self, config: FMConfig, shape: TowerShape) -> None:
        super().__init__()
        self.linear = LinearTerm(shape)
        self.fields = FieldStack(shape, "deep", config.embedding_dim, numbers=True)
        self.interaction = FMInteraction()

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits_BT: Tensor = self.linear(inputs) + self.interaction(self.fields(inputs))
        return logits_BT
