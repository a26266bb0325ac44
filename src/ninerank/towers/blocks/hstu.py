"""Hierarchical sequential transduction unit: attention over a sequence without a softmax.

Shape legend: B rows, L sequence length (M positions attended to), D width, N heads, A width of a query or key, V width of a value. Without
padding: N positions of all histories, H heads, M distances.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ninerank.fusion.kernels.hstu_attention import hstu_attention
from ninerank.towers.blocks.mlp import linear

__all__ = ["HSTULayer"]


class HSTULayer(nn.Module):
    """x + W_2 (norm(A v) * u) with u, v, q, k = silu(W_1 norm(x)) and weights A_lm = silu(<q_l, k_m> + p_{l-m} + t_{bucket(l, m)}) / C.

    Zhai et al., Actions Speak Louder than Words, ICML 2024, equations 1 to 3. Weights are pointwise, not normalised over the sequence,
    so that their sum says how strong an interest is; C = `max_length` keeps them small and does not depend on padding. Causal: l sees
    m <= l. p is learned per distance (positions further apart than `max_length` share the last one), and, with `num_time_buckets`, t per
    power of two of the time between the two in seconds; both are off on demand. Places outside the mask have no influence and give zeros.

    x (B, L, D), mask bool (B, L), time (B, L) in seconds, any number type -> (B, L, D).

    >>> layer = HSTULayer(4, num_heads=2, qk_dim=3, value_dim=5, max_length=8)
    >>> layer(torch.ones(2, 6, 4), torch.ones(2, 6, dtype=torch.bool)).shape
    torch.Size([2, 6, 4])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qk_dim: int,
        value_dim: int,
        max_length: int,
        has_position_bias: bool = True,
        num_time_buckets: int = 0,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.value_shape, self.key_shape = (num_heads, value_dim), (num_heads, qk_dim)
        widths = [num_heads * value_dim, num_heads * value_dim, num_heads * qk_dim, num_heads * qk_dim]
        self.widths = widths
        self.norm = nn.LayerNorm(dim)
        self.project = linear(dim, sum(widths))
        self.out_norm = nn.LayerNorm(widths[0])
        self.out = linear(widths[0], dim)
        self.position = nn.Parameter(torch.randn(max_length) * 0.02) if has_position_bias else None
        self.time = nn.Parameter(torch.randn(num_time_buckets) * 0.02) if num_time_buckets else None

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, time_BL: Tensor | None = None) -> Tensor:
        u, v, q, k = torch.split(functional.silu(self.project(self.norm(x_BLD))), self.widths, dim=2)
        v_BNLV = torch.unflatten(v, 2, self.value_shape).transpose(1, 2)
        q_BNLA, k_BNLA = (torch.unflatten(part, 2, self.key_shape).transpose(1, 2) for part in (q, k))
        score_BNLM = torch.matmul(q_BNLA, k_BNLA.transpose(2, 3))
        place_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        distance_LM = place_L.unsqueeze(1) - place_L
        if self.position is not None:
            score_BNLM = score_BNLM + self.position[distance_LM.clamp(0, self.max_length - 1)]
        if self.time is not None:
            assert time_BL is not None, "a layer with time buckets needs the times"
            score_BNLM = score_BNLM + self.time[self.bucket(time_BL)].unsqueeze(1)
        is_seen_BLM = (distance_LM >= 0) & mask_BL.unsqueeze(1)
        weight_BNLM = functional.silu(score_BNLM).masked_fill(~is_seen_BLM.unsqueeze(1), 0.0) / self.max_length
        attended_BLV = torch.matmul(weight_BNLM, v_BNLV).transpose(1, 2).flatten(2)
        y_BLD: Tensor = x_BLD + self.out(self.out_norm(attended_BLV) * u)
        return y_BLD.masked_fill(~mask_BL.unsqueeze(2), 0.0)

    def jagged(self, x_ND: Tensor, offsets: Tensor) -> Tensor:
        """The same (N, D) of histories without padding: x (N, D), history after history, offsets (B + 1,).

        No matrix of the pairs is made, and padding costs nothing. Raises ValueError for a layer with time buckets.
        """
        if self.time is not None:
            raise ValueError("an HSTU layer's biases of time are for padded histories")
        u, v, q, k = torch.split(functional.silu(self.project(self.norm(x_ND))), self.widths, dim=1)
        v_NHV, (q_NHA, k_NHA) = torch.unflatten(v, 1, self.value_shape), (torch.unflatten(part, 1, self.key_shape) for part in (q, k))
        position_M = x_ND.new_zeros(1) if self.position is None else self.position
        attended_NV = hstu_attention(q_NHA, k_NHA, v_NHV, position_M, offsets, 1 / self.max_length).flatten(1)
        y_ND: Tensor = x_ND + self.out(self.out_norm(attended_NV) * u)
        return y_ND

    def bucket(self, time_BL: Tensor) -> Tensor:
        """floor(log2(max(|t_l - t_m|, 1))), at most the last bucket: (B, L) -> int64 (B, L, M)."""
        assert self.time is not None
        # float64 holds seconds since 1970 and their differences exactly.
        apart_BLM = (time_BL.unsqueeze(2) - time_BL.unsqueeze(1)).abs().to(torch.float64).clamp(min=1)
        return apart_BLM.log2().floor().long().clamp(max=self.time.shape[0] - 1)
