"""DCN V2: a cross network of explicit, bounded-degree crosses with an MLP beside it or on top of it.

    x_0 = [e_1, ..., e_F, x]          x_{l+1} = x_0 * (W_l x_l + b_l) + x_l,   W_l = U_l V_l^T with `low_rank`
    with `experts`: x_{l+1} = sum_e g_e(x_l) E_e(x_l) + x_l, see `blocks.interaction.CrossMixture`
    parallel: logit = w^T [x_L, MLP(x_0)] + b          stacked: logit = w^T MLP(x_L) + b

Wang et al., DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems, WWW 2021.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.fields import FlatInput
from ninerank.towers.blocks.interaction import CrossNet
from ninerank.towers.blocks.mlp import MLP, linear
from ninerank.towers.config import DCNv2Config
from ninerank.towers.model import TowerShape

__all__ = ["DCNv2"]


class DCNv2(nn.Module):
    """Logits (B, T) from the `deep` group; see the equations above."""

    def __init__(self, config: DCNv2Config, shape: TowerShape) -> None:
        super().__init__()
        self.is_parallel = config.structure == "parallel"
        self.flat = FlatInput(shape, config.embedding_dim)
        self.cross = CrossNet(self.flat.width, config.cross_layers, config.low_rank, config.experts)
        self.mlp = MLP(self.flat.width, config.mlp)
        self.out = linear(self.mlp.width + (self.flat.width if self.is_parallel else 0), shape.num_tasks)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        x0_BI = self.flat(inputs)
        crossed_BI = self.cross(x0_BI)
        top = torch.cat([crossed_BI, self.mlp(x0_BI)], dim=1) if self.is_parallel else self.mlp(crossed_BI)
        logits_BT: Tensor = self.out(top)
        return logits_BT
