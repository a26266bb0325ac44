"""Bilinear pairs of fields, and a gate that weighs fields: the parts of FiBiNET.

Shape legend: B scored rows, F fields, D embedding dim, P field pairs F (F - 1) / 2, R reduced fields.
"""

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.mlp import linear
from ninerank.towers.config import BilinearKind

__all__ = ["SENET", "BilinearInteraction"]


class BilinearInteraction(nn.Module):
    """p_fg = (v_f W) * v_g of every pair f < g, elementwise product, pairs in the order (0,1), (0,2), ...: (B, F, D) -> (B, P, D).

    `kind` says how many W (D, D) there are: one for `all` pairs, one for `each` left field f, or one per pair (`interaction`).
    Huang et al., FiBiNET, RecSys 2019.

    >>> pairs = BilinearInteraction(2, 2, "all")
    >>> _ = torch.nn.init.eye_(pairs.weight)
    >>> pairs(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist()
    [[[3.0, 8.0]]]
    """

    left_P: Tensor
    right_P: Tensor

    def __init__(self, num_fields: int, dim: int, kind: BilinearKind) -> None:
        super().__init__()
        self.kind = kind
        left_P, right_P = torch.triu_indices(num_fields, num_fields, offset=1)
        self.num_pairs = num_fields * (num_fields - 1) // 2
        self.register_buffer("left_P", left_P, persistent=False)
        self.register_buffer("right_P", right_P, persistent=False)
        # The last field is left of none.
        self.num_left = max(num_fields - 1, 0)
        counts = {"all": (), "each": (self.num_left,), "interaction": (self.num_pairs,)}
        self.weight = nn.Parameter(torch.randn(*counts[kind], dim, dim) * (2 / (dim + dim)) ** 0.5)

    def forward(self, fields_BFD: Tensor) -> Tensor:
        right_BPD = fields_BFD.index_select(1, self.right_P)
        if self.kind == "interaction":
            left_PBD = fields_BFD.index_select(1, self.left_P).transpose(0, 1)
            return torch.bmm(left_PBD, self.weight).transpose(0, 1) * right_BPD
        left_BFD = fields_BFD[:, : self.num_left]
        if self.kind == "all":
            turned_BFD = torch.matmul(left_BFD, self.weight)
        else:
            turned_BFD = torch.bmm(left_BFD.transpose(0, 1), self.weight).transpose(0, 1)
        return turned_BFD.index_select(1, self.left_P) * right_BPD


class SENET(nn.Module):
    """v_f a_f with a = relu(W_2 relu(W_1 z)), z_f = mean_d v_fd: each field times one number that all fields decide. (B, F, D) -> same.

    W_1 is (R, F) and W_2 (F, R) with R = F / `reduction`, rounded down, at least 1. Hu et al., Squeeze-and-Excitation Networks, CVPR
    2018; over fields Huang et al., FiBiNET, RecSys 2019. W_2 starts without negative numbers: a field whose a_f started at zero for
    all rows would get no gradient and stay there.
    """

    def __init__(self, num_fields: int, reduction: int) -> None:
        super().__init__()
        width = max(num_fields // reduction, 1)
        self.squeeze = linear(num_fields, width, bias=False)
        self.excite = linear(width, num_fields, bias=False)
        with torch.no_grad():
            self.excite.weight.abs_()

    def forward(self, fields_BFD: Tensor) -> Tensor:
        weight_BF = torch.relu(self.excite(torch.relu(self.squeeze(fields_BFD.mean(2)))))
        out: Tensor = fields_BFD * weight_BF.unsqueeze(2)
        return out
