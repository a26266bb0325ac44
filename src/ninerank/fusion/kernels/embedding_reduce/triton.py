"""Triton launch of the sums by row: entries sorted and cut into segments, then the pooling kernel runs over gradients.

A tile takes as long as its longest segment, so that one hot row would hold its neighbours up; long segments are summed
in pieces first. The pieces depend on the batch alone, not on the device, so the order of summation is fixed.
"""

import torch
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import pool_segments
from ninerank.fusion.kernels.embedding_reduce.segments import Segments, by_row

__all__ = ["run", "shortened"]

PIECE_ENTRIES = 64


def run(grad_GD: Tensor, rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    grad_GD, segments = shortened(grad_GD.to(torch.float32), by_row(rows_N, grad_row_N, scale_N, num_rows))
    return segments.rows_U, pool_segments(grad_GD, segments.entry_N, segments.scale_N, segments.starts_U, segments.lengths_U, None)


def shortened(grad_GD: Tensor, segments: Segments) -> tuple[Tensor, Segments]:
    """The same sums with segments of few entries: gradients summed in pieces, and segments of the pieces."""
    if segments.longest <= PIECE_ENTRIES:
        return grad_GD, segments
    pieces_U = (segments.lengths_U + PIECE_ENTRIES - 1) // PIECE_ENTRIES
    first_U = (pieces_U.cumsum(0) - pieces_U).to(torch.int32)
    owner_P = torch.repeat_interleave(torch.arange(len(pieces_U), device=pieces_U.device), pieces_U)
    within_P = torch.arange(len(owner_P), dtype=torch.int32, device=pieces_U.device) - first_U[owner_P]
    starts_P = segments.starts_U[owner_P] + within_P * PIECE_ENTRIES
    lengths_P = (segments.lengths_U[owner_P] - within_P * PIECE_ENTRIES).clamp(max=PIECE_ENTRIES)
    sums_PD = pool_segments(grad_GD, segments.entry_N, segments.scale_N, starts_P, lengths_P, None)
    piece_P = torch.arange(len(owner_P), dtype=torch.int32, device=pieces_U.device)
    longest = -(-segments.longest // PIECE_ENTRIES)
    return shortened(sums_PD, Segments(segments.rows_U, first_U, pieces_U.to(torch.int32), piece_P, None, longest))
