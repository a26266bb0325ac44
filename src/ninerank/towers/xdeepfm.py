"""xDeepFM: logit = b + sum_f w_f + w^T CIN(v) + MLP(v), v the fields, numbers (x_j v_j) and sequence means among them.

Lian et al., xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender Systems, KDD 2018.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ninerank.towers.blocks.cin import CIN
from ninerank.towers.blocks.fields import FieldStack, LinearTerm
from ninerank.towers.blocks.mlp import MLP, linear
from ninerank.towers.config import XDeepFMConfig
from ninerank.towers.model import TowerShape

__all__ = ["XDeepFM"]


class XDeepFM(nn.Module):
    """Logits (B, T) from the groups `linear` and `deep`; see the equation above."""

    def __init__(self, config: XDeepFMConfig, shape: TowerShape) -> None:
        super().__init__()
        self.linear = LinearTerm(shape)
        self.fields = FieldStack(shape, "deep", config.embedding_dim, numbers=True)
        self.cin = CIN(self.fields.num_fields, config.cin)
        self.cin_out = linear(self.cin.width, shape.num_tasks, bias=False)
        self.mlp = MLP(self.fields.num_fields * config.embedding_dim, config.mlp, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        fields_BFD = self.fields(inputs)
        logits_BT: Tensor = self.linear(inputs) + self.cin_out(self.cin(fields_BFD)) + self.mlp(fields_BFD.flatten(1))
        return logits_BT
