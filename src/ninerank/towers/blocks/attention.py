"""Attention of a target over a history.

Shape legend: B scored rows, L sequence length, N positions of all histories, D embedding dim, H width of a layer.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ninerank.fusion.kernels.jagged_attention import jagged_attention
from ninerank.fusion.kernels.jagged_pairs import jagged_pairs
from ninerank.towers.blocks.mlp import Dice, activation, linear
from ninerank.towers.config import Activation

__all__ = ["TargetAttention"]


class TargetAttention(nn.Module):
    """sum_j a(k_j, q) k_j over the history k_1 ... k_L of target q, with a = MLP([q, k_j, q - k_j, q * k_j]), one number.

    Zhou et al., Deep Interest Network, KDD 2018, equation 3: the weights are not normalised, so that their sum says how strong
    the interest is; `softmax` normalises them over the history. An empty history gives zeros; places outside the mask have no
    influence. query (B, D), keys (B, L, D), mask bool (B, L) -> (B, D).
    """

    def __init__(self, dim: int, hidden: Sequence[int], act: Activation, *, softmax: bool = False) -> None:
        super().__init__()
        self.softmax = softmax
        widths = [4 * dim, *hidden]
        self.linears = nn.ModuleList(linear(a, b) for a, b in pairwise(widths))
        self.activations = nn.ModuleList(activation(act, width) for width in hidden)
        self.out = linear(widths[-1], 1)

    def forward(self, query_BD: Tensor, keys_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLH = self._first(query_BD, keys_BLD)
        for layer, act in zip(self._layers[1:], self.activations, strict=True):
            x_BLH = layer(act(x_BLH, mask_BL) if isinstance(act, Dice) else act(x_BLH))
        score_BL = x_BLH.squeeze(2)
        if self.softmax:
            score_BL = torch.softmax(score_BL.masked_fill(~mask_BL, torch.finfo(score_BL.dtype).min), dim=1)
        weight_BL = score_BL.masked_fill(~mask_BL, 0.0)
        return torch.bmm(weight_BL.unsqueeze(1), keys_BLD).squeeze(1)

    def _first(self, query_BD: Tensor, keys_BLD: Tensor) -> Tensor:
        """First layer of [q, k, q - k, q * k]: (B, L, H); in training as q (W_q + W_d) + k (W_k - W_d) + (q * k) W_p + b.

        That is half of its multiplications: q's part is there once per row, not per position, and k's does not depend on the target. In
        evaluation the layer is left as in the paper, for the compiler does the same to the graph and also shares k's part among the rows
        of a request.
        """
        first, query_B1D = self._layers[0], query_BD.unsqueeze(1)
        if not self.training:
            query_BLD = query_B1D.expand_as(keys_BLD)
            x_BLH: Tensor = first(torch.cat([query_BLD, keys_BLD, query_BLD - keys_BLD, query_BLD * keys_BLD], dim=2))
            return x_BLH
        query_HD, key_HD, product_HD = _folded(first.weight)
        of_query_B1H = functional.linear(query_B1D, query_HD, first.bias)
        return functional.linear(keys_BLD, key_HD) + functional.linear(query_B1D * keys_BLD, product_HD) + of_query_B1H

    @property
    def _layers(self) -> list[nn.Linear]:
        """Linear layers from the first to the one score."""
        return [*self.linears, self.out]

    def jagged(self, query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> Tensor:
        """The same (B, D) of histories without padding: key (N, D), history after history, offsets (B + 1,)."""
        first, *rest = self._layers
        x_NH = functional.linear(jagged_pairs(query_BD, key_ND, offsets), torch.cat(_folded(first.weight), dim=1), first.bias)
        for layer, act in zip(rest, self.activations, strict=True):
            x_NH = layer(act(x_NH))
        score_N = x_NH.squeeze(1).to(key_ND.dtype)
        return jagged_attention(score_N, key_ND, offsets, softmax=self.softmax)


def _folded(weight_H4D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of q, k and q * k that do what those of [q, k, q - k, q * k] do."""
    query_HD, key_HD, difference_HD, product_HD = weight_H4D.chunk(4, dim=1)
    return query_HD + difference_HD, key_HD - difference_HD, product_HD
