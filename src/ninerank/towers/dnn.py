"""Deep network: logit = MLP([e_1, ..., e_F, x]), e_f the fields' embeddings and x the numbers.

Covington, Adams, Sargin, Deep Neural Networks for YouTube Recommendations, RecSys 2016 (its ranking network); a sequence is
the mean of its ids' embeddings, as there.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ninerank.towers.blocks.fields import FlatInput
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import DNNConfig
from ninerank.towers.model import TowerShape

__all__ = ["DNN"]


class DNN(nn.Module):
    """Logits (B, T) from the `deep` group; see the equation above."""

    def __init__(self, config: DNNConfig, shape: TowerShape) -> None:
        super().__init__()
        self.flat = FlatInput(shape, config.embedding_dim)
        self.mlp = MLP(self.flat.width, config.mlp, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        logits_BT: Tensor = self.mlp(self.flat(inputs))
        return logits_BT
