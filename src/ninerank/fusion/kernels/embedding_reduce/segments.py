"""Entries of a batch sorted by row and cut into segments, by torch operators: what the Triton kernels start from.

Sorting stays outside the kernels: Ascend has no sort inside Triton, and its scattered atomics are slow and unordered.
N entries, U touched rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Segments", "by_row"]


@dataclass(frozen=True)
class Segments:
    """rows_U: touched rows, ascending. starts_U, lengths_U: int32, each row's entries among the sorted ones.

    entry_N: int32 output of each sorted entry. scale_N: float32, None for 1. longest: largest length.
    """

    rows_U: Tensor
    starts_U: Tensor
    lengths_U: Tensor
    entry_N: Tensor
    scale_N: Tensor | None
    longest: int


def by_row(rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None, num_rows: int) -> Segments:
    """Segments of the entries, each in the order of the batch; raises IndexError for a row outside the storage."""
    sorted_N, order_N = torch.sort(rows_N, stable=True)
    rows_U, lengths_U = torch.unique_consecutive(sorted_N, return_counts=True)
    longest = 0
    if rows_U.numel():
        # One wait for the device answers all that the host must know.
        lowest, highest, longest = torch.stack([rows_U[0], rows_U[-1], lengths_U.max().to(rows_U.dtype)]).tolist()
        if lowest < 0 or highest >= num_rows:
            raise IndexError(f"rows {lowest} to {highest} are not all in the storage of {num_rows} rows")
    starts_U = lengths_U.cumsum(0) - lengths_U
    entry_N = order_N if grad_row_N is None else grad_row_N[order_N]
    scale_N = None if scale_N is None else scale_N.to(torch.float32)[order_N]
    return Segments(rows_U, starts_U.to(torch.int32), lengths_U.to(torch.int32), entry_N.to(torch.int32), scale_N, longest)
