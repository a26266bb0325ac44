"""DLRM: the numbers pass a bottom MLP and become one more field z; the top MLP sees z and all pairwise dot products.

    z = MLP_bottom(x)          logit = MLP_top([z, <v_f, v_g> for f > g]),   v = (z, e_1, ..., e_F)

Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019. Without numbers there is no
z, and the top MLP sees the dot products alone. A sequence is the mean of its ids' embeddings.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.errors import SpecError
from ninerank.towers.blocks.fields import FieldStack
from ninerank.towers.blocks.interaction import DotInteraction
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import DLRMConfig
from ninerank.towers.model import TowerShape

__all__ = ["DLRM"]


class DLRM(nn.Module):
    """Logits (B, T) from the `deep` group; raises SpecError for a spec in which nothing can interact."""

    def __init__(self, config: DLRMConfig, shape: TowerShape) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.fields = FieldStack(shape, "deep", dim, numbers=False)
        bottom = config.bottom.model_copy(update={"hidden": (*config.bottom.hidden, dim)})
        self.bottom = MLP(shape.num_dense, bottom) if shape.num_dense else None
        has_z = self.bottom is not None
        self.interaction = DotInteraction(self.fields.num_fields + has_z)
        width = self.interaction.num_pairs + (dim if has_z else 0)
        if width == 0:
            raise SpecError("model dlrm: a spec with one field and no number has nothing to interact; add features or take lr or dnn")
        self.top = MLP(width, config.top, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        fields_BFD = self.fields(inputs)
        if self.bottom is None:
            x_BI = self.interaction(fields_BFD)
        else:
            z_BD = self.bottom(inputs["dense"])
            x_BI = torch.cat([z_BD, self.interaction(torch.cat([z_BD.unsqueeze(1), fields_BFD], dim=1))], dim=1)
        logits_BT: Tensor = self.top(x_BI)
        return logits_BT
