"""Multi-gate mixture of experts: tasks share experts and mix them each in its own way.

    logit_t = MLP_t(sum_e g_te f_e(x))          g_t = softmax(W_t x),  x = [e_1, ..., e_F, numbers]

The spec's labels are the tasks. Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts,
KDD 2018.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.experts import Experts, Gate
from ninerank.towers.blocks.fields import FlatInput
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import MMoEConfig
from ninerank.towers.model import TowerShape

__all__ = ["MMoE"]


class MMoE(nn.Module):
    """Logits (B, T) from the `deep` group; see the equation above."""

    def __init__(self, config: MMoEConfig, shape: TowerShape) -> None:
        super().__init__()
        self.flat = FlatInput(shape, config.embedding_dim)
        self.experts = Experts(self.flat.width, config.experts, config.expert)
        self.gates = nn.ModuleList(Gate(self.flat.width, config.experts) for _ in range(shape.num_tasks))
        self.towers = nn.ModuleList(MLP(self.experts.width, config.tower, 1) for _ in range(shape.num_tasks))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        x_BI = self.flat(inputs)
        experts_BEH = self.experts(x_BI)
        return torch.cat([tower(gate(x_BI, experts_BEH)) for gate, tower in zip(self.gates, self.towers, strict=True)], dim=1)
