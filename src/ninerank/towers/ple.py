"""Progressive layered extraction: levels of experts, of each task its own and shared ones.

    x_t^0 = x_s^0 = x = [e_1, ..., e_F, numbers]          (x_1^l, ..., x_T^l, x_s^l) = CGC^l(x_1^{l-1}, ..., x_T^{l-1}, x_s^{l-1})
    logit_t = MLP_t(x_t^L)

CGC is `blocks.experts.CGC`; the last level has no shared output. The spec's labels are the tasks. Tang et al., Progressive Layered
Extraction (PLE): A Novel Multi-Task Learning Model for Personalized Recommendations, RecSys 2020; with `levels: 1` it is its CGC.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.experts import CGC
from ninerank.towers.blocks.fields import FlatInput
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import PLEConfig
from ninerank.towers.model import TowerShape

__all__ = ["PLE"]


class PLE(nn.Module):
    """Logits (B, T) from the `deep` group; see the equations above."""

    def __init__(self, config: PLEConfig, shape: TowerShape) -> None:
        super().__init__()
        self.flat = FlatInput(shape, config.embedding_dim)
        self.levels = nn.ModuleList()
        width = self.flat.width
        for number in range(config.levels):
            has_shared_gate = number < config.levels - 1
            level = CGC(width, shape.num_tasks, config.task_experts, config.shared_experts, config.expert, has_shared_gate=has_shared_gate)
            self.levels.append(level)
            width = level.width
        self.towers = nn.ModuleList(MLP(width, config.tower, 1) for _ in range(shape.num_tasks))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        outputs = [self.flat(inputs)] * (len(self.towers) + 1)
        for level in self.levels:
            outputs = level(outputs)
        return torch.cat([tower(x_BH) for tower, x_BH in zip(self.towers, outputs, strict=True)], dim=1)
