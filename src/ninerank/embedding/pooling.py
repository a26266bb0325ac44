"""From looked-up rows, which lie bag after bag, to one vector a bag or to padded sequences.

Neither direction needs a scatter that adds, so that sums come in one order on every device.

Shape legend: N ids, M bags (F features of B bags each), D embedding dim, S sequence features, R rows, L places of one feature's rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ninerank.fusion.kernels.jagged import expanded

__all__ = ["Jagged", "Padding", "pool_rows"]


class _SumRows(torch.autograd.Function):
    """Sum of each bag's rows; the backward is a gather."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, offsets: Tensor, bag_N: Tensor) -> Tensor:
        ctx.save_for_backward(bag_N)
        each = torch.arange(rows_ND.shape[0], device=rows_ND.device)
        return functional.embedding_bag(each, rows_ND, offsets, mode="sum", include_last_offset=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        return grad_MD.index_select(0, ctx.saved_tensors[0]), None, None


def pool_rows(rows_ND: Tensor, offsets: Tensor | None, num_features: int, mean_F: Tensor | None = None) -> Tensor:
    """Bags (B, F, D) of rows that lie bag after bag, feature by feature: sums, or means for features with `mean_F`; zeros if empty.

    offsets: (F * B + 1,) start of each bag, None where each holds one row.

    >>> pool_rows(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 2, 2, 3, 3]), 2, torch.tensor([True, False])).squeeze(-1)
    tensor([[1.5000, 4.0000],
            [0.0000, 0.0000]])
    """
    dim = rows_ND.shape[1]
    if offsets is None:
        return rows_ND.view(num_features, rows_ND.shape[0] // num_features, dim).transpose(0, 1)
    length_M = offsets.diff()
    pooled_MD = cast("Tensor", _SumRows.apply(rows_ND, offsets, _bag_of(length_M, rows_ND.shape[0])))  # type: ignore[no-untyped-call]
    num_bags = length_M.numel() // num_features
    pooled_FBD = pooled_MD.view(num_features, num_bags, dim)
    if mean_F is not None:
        count_FB1 = torch.where(mean_F[:, None], length_M.view(num_features, num_bags).clamp(min=1), 1).unsqueeze(-1)
        pooled_FBD = pooled_FBD * count_FB1.to(rows_ND.dtype).reciprocal()
    return pooled_FBD.transpose(0, 1)


@dataclass(frozen=True)
class Padding:
    """Where the ids of S sequence features over R rows lie in zero-padded (R, L) arrays, one a feature, each with its own L.

    >>> padding = Padding.of(torch.tensor([2, 0, 1, 1]), num_ids=4, num_rows=2, widths=[2, 1])
    >>> [rows.flatten().tolist() for rows in padding.pad(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))]
    [[1.0, 2.0, 0.0, 0.0], [3.0, 4.0]]
    >>> [mask.tolist() for mask in padding.masks]
    [[[True, True], [False, False]], [[True], [True]]]
    """

    place_N: Tensor
    masks: tuple[Tensor, ...]

    @classmethod
    def of(cls, length_M: Tensor, num_ids: int, num_rows: int, widths: Sequence[int]) -> "Padding":
        """length_M: ids a row, feature after feature, `num_ids` in all. No row is longer than its feature's width."""
        device = length_M.device
        places = [torch.arange(width, device=device) for width in widths]
        masks = tuple(place_L < own_R[:, None] for place_L, own_R in zip(places, length_M.view(len(widths), num_rows), strict=True))
        bases = accumulate((width * num_rows for width in widths), initial=0)
        rows_R = torch.arange(num_rows, device=device)
        base_M = torch.cat([base + rows_R * width for base, width in zip(bases, widths, strict=False)])
        start_M = length_M.cumsum(0) - length_M
        bag_N = _bag_of(length_M, num_ids)
        return cls((base_M - start_M)[bag_N] + torch.arange(num_ids, device=device), masks)

    def pad(self, rows_ND: Tensor) -> list[Tensor]:
        """Rows of each feature (R, L, D), zero beyond each sequence's end."""
        sizes = [mask.numel() for mask in self.masks]
        flat = rows_ND.new_zeros(sum(sizes), rows_ND.shape[1]).index_copy(0, self.place_N, rows_ND)
        parts = torch.split_with_sizes(flat, sizes)
        return [part.view(*mask.shape, rows_ND.shape[1]) for part, mask in zip(parts, self.masks, strict=True)]


@dataclass(frozen=True)
class Jagged:
    """Where the ids of S sequence features over R rows lie when nothing pads them: each feature's own, row after row.

    offsets: (R + 1,) of each feature. positions: for rows that several candidates share, what each of them takes (`row_B` of `of`).

    >>> jagged = Jagged.of(torch.tensor([2, 0, 1, 1]), num_rows=2, num_features=2)
    >>> [rows.flatten().tolist() for rows in jagged.split(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))]
    [[1.0, 2.0], [3.0, 4.0]]
    >>> [offsets.tolist() for offsets in jagged.offsets]
    [[0, 2, 2], [0, 1, 2]]
    """

    offsets: tuple[Tensor, ...]
    sizes: list[int]
    positions: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, length_M: Tensor, num_rows: int, num_features: int, row_B: Tensor | None = None) -> "Jagged":
        """length_M: ids a row, feature after feature. row_B: the row that each of B candidates takes, None where each has its own."""
        length_SR = length_M.view(num_features, num_rows)
        offsets_SR = torch.cat([length_SR.new_zeros(num_features, 1), length_SR.cumsum(1)], dim=1)
        sizes = offsets_SR[:, -1].tolist()
        if row_B is None:
            return cls(offsets_SR.unbind(0), sizes, None)
        taken = [expanded(offsets, row_B) for offsets in offsets_SR.unbind(0)]
        return cls(tuple(offsets for _, offsets in taken), sizes, tuple(positions for positions, _ in taken))

    def split(self, rows_ND: Tensor) -> list[Tensor]:
        """Rows (N, D) of each feature."""
        parts = list(torch.split_with_sizes(rows_ND, self.sizes))
        if self.positions is None:
            return parts
        return [part.index_select(0, position_P) for part, position_P in zip(parts, self.positions, strict=True)]


def _bag_of(length_M: Tensor, num_ids: int) -> Tensor:
    """Bag (N,) that each id is in."""
    return torch.arange(length_M.numel(), device=length_M.device).repeat_interleave(length_M, output_size=num_ids)
