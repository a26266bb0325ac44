"""FiBiNET: logit = b + sum_f w_f + MLP([p_fg of v, p_fg of a * v, for f < g]), p_fg the bilinear pairs, a the gate of each field.

v are the fields, numbers (x_j v_j) and sequence means among them; the pairs of v and those of a * v have matrices of their own.
Huang, Zhang, Zhang, FiBiNET: Combining Feature Importance and Bilinear Feature Interaction for CTR Prediction, RecSys 2019.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.errors import SpecError
from ninerank.towers.blocks.bilinear import SENET, BilinearInteraction
from ninerank.towers.blocks.fields import FieldStack, LinearTerm
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import FiBiNETConfig
from ninerank.towers.model import TowerShape

__all__ = ["FiBiNET"]


class FiBiNET(nn.Module):
    """Logits (B, T) from the groups `linear` and `deep`; raises SpecError for a spec of one field, which has no pair."""

    def __init__(self, config: FiBiNETConfig, shape: TowerShape) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.linear = LinearTerm(shape)
        self.fields = FieldStack(shape, "deep", dim, numbers=True)
        num_fields = self.fields.num_fields
        if num_fields < 2:
            raise SpecError("model fibinet: a spec with one feature has nothing to interact; add features or take lr or dnn")
        self.gate = SENET(num_fields, config.reduction)
        self.plain = BilinearInteraction(num_fields, dim, config.bilinear)
        self.gated = BilinearInteraction(num_fields, dim, config.bilinear)
        self.mlp = MLP(2 * self.plain.num_pairs * dim, config.mlp, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        fields_BFD = self.fields(inputs)
        pairs_BPD = torch.cat([self.plain(fields_BFD), self.gated(self.gate(fields_BFD))], dim=1)
        logits_BT: Tensor = self.linear(inputs) + self.mlp(pairs_BPD.flatten(1))
        return logits_BT
