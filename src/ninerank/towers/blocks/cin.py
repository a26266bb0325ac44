"""Compressed interaction network: crosses of whole vectors, one degree more in each layer.

Shape legend: B scored rows, F fields, D embedding dim, H vectors of a layer, G vectors of the layer before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["CIN"]


class CIN(nn.Module):
    """[s^1, ..., s^K] of layers x^k_h = sum_{i,j} W^k_hij (x^{k-1}_i * x^0_j), x^0 the fields, s^k_h = sum_d x^k_hd.

    Lian et al., xDeepFM, KDD 2018, with the identity as activation, which they found best. Elementwise products of
    whole vectors: layer k holds crosses of degree k + 1. (B, F, D) -> (B, `width`), width = sum of `layers`.

    >>> cin = CIN(2, (1,))
    >>> _ = torch.nn.init.ones_(cin.weights[0])
    >>> cin(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]])).tolist()  # (1 + 3)^2 + (2 + 1)^2
    [[25.0]]
    """

    def __init__(self, num_fields: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.width = sum(layers)
        self.weights = nn.ParameterList()
        num_before = num_fields
        for num_vectors in layers:
            pairs = num_before * num_fields
            self.weights.append(nn.Parameter(torch.randn(num_vectors, pairs) * (2 / (num_vectors + pairs)) ** 0.5))
            num_before = num_vectors

    def forward(self, fields_BFD: Tensor) -> Tensor:
        x_BGD, sums = fields_BFD, []
        for weight in self.weights:
            products_BGFD = x_BGD.unsqueeze(2) * fields_BFD.unsqueeze(1)
            x_BGD = torch.matmul(weight, products_BGFD.flatten(1, 2))
            sums.append(x_BGD.sum(2))
        return torch.cat(sums, dim=1)
