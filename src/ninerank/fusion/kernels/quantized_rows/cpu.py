"""Numba kernel: threads share the output rows out, rows ahead are prefetched, codes become floats in registers."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit_for, prefetch, rows_ahead
from ninerank.fusion.kernels.lanes import arithmetic, code_loads
from ninerank.fusion.kernels.quantized_rows import HEADER_BYTES, code_bytes

__all__ = ["run"]

ALL_ROWS_VALID = -1


def run(storage_VS: Tensor, rows_N: Tensor, dim: int, bits: int) -> Tensor:
    num_rows, stride = storage_VS.shape
    out_ND = torch.empty(rows_N.numel(), dim)
    # Columns that lie one after another both in the storage and in the output: a row, or one of its halves.
    piece = code_bytes(dim, bits)
    wrong = threads.run(
        _kernel(fixed_dim(piece) if dim % piece == 0 else 0, bits),
        threads.num_threads_for(out_ND.numel() * 2),
        *(as_numpy(storage_VS), as_numpy(storage_VS.view(torch.float32)), as_numpy(rows_N.contiguous()), as_numpy(out_ND)),
        *(num_rows, stride, dim, piece, rows_ahead(stride)),
    )
    for position in wrong:
        if position != ALL_ROWS_VALID:
            raise IndexError(f"row {int(rows_N[position])} (number {position} of the lookup) is outside the storage of {num_rows} rows")
    return out_ND


@cache
def _kernel(fixed: int, bits: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    whole, low, high = code_loads(fixed)
    put, each, width = ops.put, ops.each, ops.width

    @jit_for(fixed, bits)
    def look_up(thread, num_threads, storage, numbers, rows, out, num_rows, stride, dim, any_piece, ahead):
        """Write this thread's outputs; returns the position of a row outside the storage, or ALL_ROWS_VALID."""
        piece = any_piece if fixed == 0 else fixed
        wrong = ALL_ROWS_VALID
        begin, end = rows.size * thread // num_threads, rows.size * (thread + 1) // num_threads
        for n in range(begin, end):
            if n + ahead < end:
                for place in range(0, stride, CACHE_LINE_BYTES):
                    prefetch(storage, np.int64(rows[n + ahead]) * stride + place)
            row = np.int64(rows[n])
            if row < 0 or row >= num_rows:
                wrong = n
                continue
            scale, bias = numbers[row, 0], numbers[row, 1]
            first, target = row * stride + HEADER_BYTES, n * dim
            if bits == 8:
                for column in range(0, piece, width):
                    put(out, target + column, each(bias) + each(scale) * whole(storage, first + column))
            else:
                for column in range(0, piece, width):
                    put(out, target + column, each(bias) + each(scale) * low(storage, first + column))
                # Of an odd dim, the last byte's high half is empty.
                for column in range(0, dim - piece, width):
                    put(out, target + piece + column, each(bias) + each(scale) * high(storage, first + column))
        return wrong

    return look_up
