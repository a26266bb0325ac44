"""Instance-guided masks: every row multiplies what it feeds forward by weights of its own.

Shape legend: B scored rows, I width of the embedding, M width of what is masked, H width of the output.
"""

import torch
from torch import Tensor, nn

from ninerank.fusion.kernels.mlp_layer import mlp_layer
from ninerank.towers.blocks import fused
from ninerank.towers.blocks.mlp import linear

__all__ = ["FieldNorm", "MaskBlock"]


class FieldNorm(nn.Module):
    """Layer normalisation of each field by itself, with a gain and a bias per field: (B, F, D) -> same.

    Ba, Kiros, Hinton, Layer Normalization, 2016; LN_EMB of Wang et al., MaskNet, DLP-KDD 2021.
    """

    def __init__(self, num_fields: int, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.gain_FD = nn.Parameter(torch.ones(num_fields, dim))
        self.bias_FD = nn.Parameter(torch.zeros(num_fields, dim))

    def forward(self, fields_BFD: Tensor) -> Tensor:
        out: Tensor = self.norm(fields_BFD) * self.gain_FD + self.bias_FD
        return out


class MaskBlock(nn.Module):
    """relu(LN(W (m * x))) with the mask m = W_2 relu(W_1 e + b_1) + b_2 of the row's embedding e: e (B, I), x (B, M) -> (B, H).

    Wang et al., MaskNet, DLP-KDD 2021: x is the normalised embedding (blocks in parallel, the first of a series)
    or the output of the block before. W_1 leads to `reduction_ratio` times M, rounded, at least 1.
    """

    def __init__(self, num_embedding: int, num_in: int, num_out: int, reduction_ratio: float) -> None:
        super().__init__()
        num_hidden = max(round(num_in * reduction_ratio), 1)
        self.mask = nn.Sequential(linear(num_embedding, num_hidden), nn.ReLU(), linear(num_hidden, num_in))
        self.hidden = linear(num_in, num_out, bias=False)
        self.norm = nn.LayerNorm(num_out)

    def forward(self, embedding_BI: Tensor, x_BM: Tensor) -> Tensor:
        out_BH: Tensor = self.norm(self.hidden(self._masked(embedding_BI, x_BM))).relu()
        return out_BH

    def _masked(self, embedding_BI: Tensor, x_BM: Tensor) -> Tensor:
        """m * x (B, M)."""
        if not fused.takes_operator(self, embedding_BI):
            masked_BM: Tensor = self.mask(embedding_BI) * x_BM
            return masked_BM
        first, _, second = self.mask
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        hidden_BH = mlp_layer(embedding_BI, first.weight, first.bias, "relu")
        return mlp_layer(hidden_BH, second.weight, second.bias, "none", x_BM)
