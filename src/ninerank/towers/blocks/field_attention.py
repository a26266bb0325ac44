"""Self-attention of fields over each other.

Shape legend: B scored rows, F fields (G the ones attended to), D width of a field, N heads, A width of a head.
"""

import torch
from torch import Tensor, nn

from ninerank.towers.blocks.mlp import linear

__all__ = ["FieldSelfAttention"]


class FieldSelfAttention(nn.Module):
    """relu([sum_g a^n_fg W_V^n v_g over heads n] + W_Res v_f), a^n_f = softmax_g <W_Q^n v_f, W_K^n v_g>: (B, F, D) -> (B, F, N A).

    Song et al., AutoInt, CIKM 2019; as there the scores are not divided by a root.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_shape = (num_heads, head_dim)
        self.width = num_heads * head_dim
        self.query = linear(dim, self.width, bias=False)
        self.key = linear(dim, self.width, bias=False)
        self.value = linear(dim, self.width, bias=False)
        self.residual = linear(dim, self.width, bias=False)

    def forward(self, fields_BFD: Tensor) -> Tensor:
        query_BNFA, key_BNFA, value_BNFA = (
            part(fields_BFD).unflatten(2, self.head_shape).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        weight_BNFG = torch.softmax(torch.matmul(query_BNFA, key_BNFA.transpose(2, 3)), dim=3)
        attended_BFD = torch.matmul(weight_BNFG, value_BNFA).transpose(1, 2).flatten(2)
        return torch.relu(attended_BFD + self.residual(fields_BFD))
