"""AutoInt: logit = w^T [h_1, ..., h_F] + b, h the fields after layers of self-attention over each other; with `mlp`, + MLP(v).

v are the fields, numbers (x_j v_j) and sequence means among them. Song et al., AutoInt: Automatic Feature Interaction Learning via
Self-Attentive Neural Networks, CIKM 2019; with `mlp` it is the paper's AutoInt+.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from ninerank.towers.blocks.field_attention import FieldSelfAttention
from ninerank.towers.blocks.fields import FieldStack
from ninerank.towers.blocks.mlp import MLP, linear
from ninerank.towers.config import AutoIntConfig
from ninerank.towers.model import TowerShape

__all__ = ["AutoInt"]


class AutoInt(nn.Module):
    """Logits (B, T) from the `deep` group; see the equation above."""

    def __init__(self, config: AutoIntConfig, shape: TowerShape) -> None:
        super().__init__()
        self.fields = FieldStack(shape, "deep", config.embedding_dim, numbers=True)
        self.layers = nn.ModuleList()
        width = config.embedding_dim
        for _ in range(config.layers):
            layer = FieldSelfAttention(width, config.heads, config.head_dim)
            self.layers.append(layer)
            width = layer.width
        num_fields = self.fields.num_fields
        self.out = linear(num_fields * width, shape.num_tasks)
        self.mlp = None if config.mlp is None else MLP(num_fields * config.embedding_dim, config.mlp, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        fields_BFD = self.fields(inputs)
        attended_BFD = fields_BFD
        for layer in self.layers:
            attended_BFD = layer(attended_BFD)
        logits_BT: Tensor = self.out(attended_BFD.flatten(1))
        return logits_BT if self.mlp is None else logits_BT + self.mlp(fields_BFD.flatten(1))
