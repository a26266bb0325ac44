"""DeepFM: logit = FM + MLP over the same fields, numbers (x_j v_j) and sequence means among them.

Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, IJCAI 2017.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ninerank.towers.blocks.fields import FieldStack, LinearTerm
from ninerank.towers.blocks.interaction import FMInteraction
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import DeepFMConfig
from ninerank.towers.model import TowerShape

__all__ = ["DeepFM"]


class DeepFM(nn.Module):
    """Logits (B, T) from the groups `linear` and `deep`; see the equation above."""

    def __init__(self, config: DeepFMConfig, shape: TowerShape) -> None:
        super().__init__()
        self.linear = LinearTerm(shape)
        self.fields = FieldStack(shape, "deep", config.embedding_dim, numbers=True)
        self.interaction = FMInteraction()
        self.mlp = MLP(self.fields.num_fields * config.embedding_dim, config.mlp, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        fields_BFD = self.fields(inputs)
        logits_BT: Tensor = self.linear(inputs) + self.interaction(fields_BFD) + self.mlp(fields_BFD.flatten(1))
        return logits_BT
