"""Experts and the gates that mix them, for several tasks.

Shape legend: B scored rows, I width of the input, E experts, H width of an expert, T tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.mlp import MLP, linear
from ninerank.towers.config import MLPConfig

__all__ = ["CGC", "Experts", "Gate"]


class Experts(nn.Module):
    """MLPs of one shape side by side over one input: (B, I) -> (B, E, H)."""

    def __init__(self, num_in: int, num_experts: int, config: MLPConfig) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(MLP(num_in, config) for _ in range(num_experts))
        self.width = config.hidden[-1] if config.hidden else num_in

    def forward(self, x_BI: Tensor) -> Tensor:
        return torch.stack([mlp(x_BI) for mlp in self.mlps], dim=1)


class Gate(nn.Module):
    """sum_e g_e f_e with g = softmax(W x): x (B, I), experts (B, E, H) -> (B, H).

    Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018.

    >>> gate = Gate(3, 2)
    >>> _ = torch.nn.init.zeros_(gate.linear.weight)
    >>> gate(torch.ones(1, 3), torch.tensor([[[1.0, 5.0], [3.0, 7.0]]])).tolist()
    [[2.0, 6.0]]
    """

    def __init__(self, num_in: int, num_experts: int) -> None:
        super().__init__()
        self.linear = linear(num_in, num_experts, bias=False)

    def forward(self, x_BI: Tensor, experts_BEH: Tensor) -> Tensor:
        weight_BE = torch.softmax(self.linear(x_BI), dim=1)
        return torch.bmm(weight_BE.unsqueeze(1), experts_BEH).squeeze(1)


class CGC(nn.Module):
    """Customised gate control: each task has experts of its own and its gate mixes these with the shared ones.

    Tang et al., Progressive Layered Extraction, RecSys 2020. With `has_shared_gate` one more gate mixes all experts,
    for the shared experts of the next level. Inputs: one (B, I) per task and last that of the shared experts; outputs: one (B, H) per
    task and, with that gate, last the shared one.
    """

    def __init__(
        self, num_in: int, num_tasks: int, task_experts: int, shared_experts: int, config: MLPConfig, *, has_shared_gate: bool
    ) -> None:
        super().__init__()
        self.own = nn.ModuleList(Experts(num_in, task_experts, config) for _ in range(num_tasks))
        self.shared = Experts(num_in, shared_experts, config)
        self.gates = nn.ModuleList(Gate(num_in, task_experts + shared_experts) for _ in range(num_tasks))
        self.shared_gate = Gate(num_in, num_tasks * task_experts + shared_experts) if has_shared_gate else None
        self.width = self.shared.width

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        *of_tasks, of_shared_BI = inputs
        shared_BEH = self.shared(of_shared_BI)
        own = [experts(x_BI) for experts, x_BI in zip(self.own, of_tasks, strict=True)]
        outputs: list[Tensor] = [
            gate(x_BI, torch.cat([own_BEH, shared_BEH], dim=1)) for gate, x_BI, own_BEH in zip(self.gates, of_tasks, own, strict=True)
        ]
        if self.shared_gate is not None:
            outputs.append(self.shared_gate(of_shared_BI, torch.cat([*own, shared_BEH], dim=1)))
        return outputs
