"""Explicit feature interactions.

Shape legend: B scored rows, F fields, D embedding dim, P field pairs F (F - 1) / 2, I width of a flat input, R rank,
E experts.
"""

import torch
from torch import Tensor, nn

from ninerank.fusion.kernels.dot_interaction import dot_interaction
from ninerank.fusion.kernels.fm_interaction import fm_interaction
from ninerank.fusion.kernels.low_rank_cross import low_rank_cross
from ninerank.towers.blocks import fused
from ninerank.towers.blocks.mlp import linear

__all__ = ["CrossLayer", "CrossMixture", "CrossNet", "DotInteraction", "FMInteraction"]


class FMInteraction(nn.Module):
    """sum_{f < g} <v_f, v_g> = 1/2 sum_d ((sum_f v_fd)^2 - sum_f v_fd^2), shape (B, 1), in O(F D).

    Rendle, Factorization Machines, ICDM 2010, lemma 3.1.

    >>> FMInteraction()(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]])).tolist()
    [[5.0]]
    """

    def forward(self, fields_BFD: Tensor) -> Tensor:
        if fused.takes_operator(self, fields_BFD):
            return fm_interaction(fields_BFD)
        square_of_sum_BD = fields_BFD.sum(1).square()
        sum_of_square_BD = fields_BFD.square().sum(1)
        return 0.5 * (square_of_sum_BD - sum_of_square_BD).sum(1, keepdim=True)


class DotInteraction(nn.Module):
    """<v_f, v_g> of every pair f > g, shape (B, P), pairs in the order (1,0), (2,0), (2,1), ...

    Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019.
    """

    place_P: Tensor

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.num_pairs = num_fields * (num_fields - 1) // 2
        row_P, column_P = torch.tril_indices(num_fields, num_fields, offset=-1)
        self.register_buffer("place_P", row_P * num_fields + column_P, persistent=False)

    def forward(self, fields_BFD: Tensor) -> Tensor:
        if fused.takes_operator(self, fields_BFD):
            return dot_interaction(fields_BFD)
        gram_BFF = torch.bmm(fields_BFD, fields_BFD.transpose(1, 2))
        return gram_BFF.flatten(1).index_select(1, self.place_P)


class CrossLayer(nn.Module):
    """x_{l+1} = x_0 * (W x_l + b) + x_l, elementwise product; W = U V^T with U, V of shape (I, R) where `low_rank` is given.

    Wang et al., DCN V2, WWW 2021, equations 1 and 2.
    """

    def __init__(self, width: int, low_rank: int | None = None) -> None:
        super().__init__()
        self.weight: nn.Module
        if low_rank is None:
            self.weight = linear(width, width)
        else:
            self.weight = nn.Sequential(linear(width, low_rank, bias=False), linear(low_rank, width))

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        out: Tensor = x0_BI * self.weight(x_BI) + x_BI
        return out


class CrossMixture(nn.Module):
    """x_{l+1} = sum_e g_e x_0 * (U_e tanh(C_e tanh(V_e^T x_l)) + b) + x_l with g = softmax(G x_l): a low-rank cross layer of E experts.

    Wang et al., DCN V2, WWW 2021, equations 3 and 4. U_e and V_e are (I, R), C_e is (R, R). The gates sum to one, so they meet the
    experts in their R numbers and one product with all U_e does the rest.
    """

    def __init__(self, width: int, low_rank: int, num_experts: int) -> None:
        super().__init__()
        self.expert_shape = (num_experts, low_rank)
        self.gate = linear(width, num_experts, bias=False)
        self.down = linear(width, num_experts * low_rank, bias=False)
        self.core_ERR = nn.Parameter(torch.randn(num_experts, low_rank, low_rank) * low_rank**-0.5)
        self.up = linear(num_experts * low_rank, width)

    def forward(self, x0_BI: Tensor, x_BI: Tensor) -> Tensor:
        inner_BER = torch.tanh(self.down(x_BI)).view(-1, *self.expert_shape)
        inner_BER = torch.tanh(torch.bmm(inner_BER.transpose(0, 1), self.core_ERR).transpose(0, 1))
        gate_BE = torch.softmax(self.gate(x_BI), dim=1)
        out: Tensor = x0_BI * self.up((inner_BER * gate_BE.unsqueeze(2)).flatten(1)) + x_BI
        return out


class CrossNet(nn.Module):
    """A stack of cross layers: polynomials up to degree `num_layers` + 1 of the input (but for the tanh of `num_experts`).

    low_rank: rank of each layer's matrices, None for full ones; num_experts: with a rank, experts per layer.
    """

    def __init__(self, width: int, num_layers: int, low_rank: int | None = None, num_experts: int | None = None) -> None:
        super().__init__()
        assert num_experts is None or low_rank is not None, "experts are of low rank"

        def layer() -> nn.Module:
            return CrossLayer(width, low_rank) if num_experts is None or low_rank is None else CrossMixture(width, low_rank, num_experts)

        self.layers = nn.ModuleList(layer() for _ in range(num_layers))
        self.has_operator = low_rank is not None and num_experts is None and num_layers > 0

    def forward(self, x0_BI: Tensor) -> Tensor:
        if self.has_operator and fused.takes_operator(self, x0_BI):
            return self._fused(x0_BI)
        x_BI = x0_BI
        for layer in self.layers:
            x_BI = layer(x0_BI, x_BI)
        return x_BI

    def _fused(self, x0_BI: Tensor) -> Tensor:
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        biases: list[Tensor] = []
        for layer in self.layers:
            down, up = layer.get_submodule("weight.0"), layer.get_submodule("weight.1")
            assert isinstance(down, nn.Linear)
            assert isinstance(up, nn.Linear)
            downs.append(down.weight)
            ups.append(up.weight.t())
            biases.append(up.bias)
        return low_rank_cross(x0_BI, torch.stack(downs), torch.stack(ups), torch.stack(biases))
