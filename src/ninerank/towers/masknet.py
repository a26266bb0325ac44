"""MaskNet: mask blocks over the embedding e and its normalised form LN(e), field by field.

    parallel: logit = MLP([h_1, ..., h_K]), h_k = Block_k(e, LN(e))
    serial:   logit = MLP(h_K), h_1 = Block_1(e, LN(e)), h_k = Block_k(e, h_{k-1})

e are the fields side by side, numbers (x_j v_j) and sequence means among them. Wang, She, Zhang, MaskNet: Introducing Feature-Wise
Multiplication to CTR Ranking Models by Instance-Guided Mask, DLP-KDD 2021, whose serial model has no hidden layer in that MLP.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.fields import FieldStack
from ninerank.towers.blocks.mask import FieldNorm, MaskBlock
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import MaskNetConfig
from ninerank.towers.model import TowerShape

__all__ = ["MaskNet"]


class MaskNet(nn.Module):
    """Logits (B, T) from the `deep` group; see the equations above."""

    def __init__(self, config: MaskNetConfig, shape: TowerShape) -> None:
        super().__init__()
        self.is_parallel = config.structure == "parallel"
        self.fields = FieldStack(shape, "deep", config.embedding_dim, numbers=True)
        self.norm = FieldNorm(self.fields.num_fields, config.embedding_dim)
        num_embedding = self.fields.num_fields * config.embedding_dim
        widths = (num_embedding, *config.blocks)
        self.blocks = nn.ModuleList(
            MaskBlock(num_embedding, num_embedding if self.is_parallel else before, width, config.reduction_ratio)
            for before, width in zip(widths, config.blocks, strict=False)
        )
        self.mlp = MLP(sum(config.blocks) if self.is_parallel else config.blocks[-1], config.mlp, shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        fields_BFD = self.fields(inputs)
        embedding_BI, x_BM = fields_BFD.flatten(1), self.norm(fields_BFD).flatten(1)
        if self.is_parallel:
            x_BM = torch.cat([block(embedding_BI, x_BM) for block in self.blocks], dim=1)
        else:
            for block in self.blocks:
                x_BM = block(embedding_BI, x_BM)
        logits_BT: Tensor = self.mlp(x_BM)
        return logits_BT
