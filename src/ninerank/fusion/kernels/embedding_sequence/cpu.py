"""Numba kernel: threads share the output rows out, rows ahead are prefetched."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.embedding_sequence import check_lengths
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit, jit_for, prefetch
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["entries", "run"]

ALL_ROWS_VALID = -1
PREFETCH_ROWS = 16


def run(weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, max_length: int) -> Tensor:
    num_rows, dim = weight_RD.shape
    if offsets is None:
        out, start = torch.empty(rows_N.numel(), dim), None
    else:
        check_lengths(offsets, max_length)
        out, start = torch.empty(offsets.numel() - 1, max_length, dim), as_numpy(offsets.contiguous())
    wrong = threads.run(
        _kernel(fixed_dim(dim), weight_RD.dtype),
        threads.num_threads_for(out.numel() * 2),
        *(as_numpy(weight_RD), as_numpy(rows_N.contiguous()), start, as_numpy(out.view(-1, dim)), max_length, num_rows, dim),
    )
    for position in wrong:
        if position != ALL_ROWS_VALID:
            raise IndexError(f"row {int(rows_N[position])} (number {position} of the lookup) is outside the storage of {num_rows} rows")
    return out


def entries(offsets: Tensor, max_length: int, num_ids: int) -> Tensor:
    """Output row of every id; see `sequence_entries`."""
    check_lengths(offsets, max_length)
    entries_N = torch.empty(num_ids, dtype=torch.int32)
    _number(as_numpy(offsets.contiguous()), max_length, as_numpy(entries_N))
    return entries_N


@jit
def _number(offsets, max_length, entries):
    for sequence in range(offsets.size - 1):
        begin, end = max(np.int64(offsets[sequence]), 0), min(np.int64(offsets[sequence + 1]), entries.size)
        for n in range(begin, end):
            entries[n] = sequence * max_length + n - begin


@cache
def _kernel(fixed: int, dtype: torch.dtype) -> Any:
    ops = arithmetic(fixed, dtype)
    load, put, width = ops.load, ops.put, ops.width
    line = CACHE_LINE_BYTES // dtype.itemsize

    @jit_for(fixed, dtype)
    def copy(thread, num_threads, weight, rows, offsets, out, max_length, num_rows, any_dim):
        """Copy this thread's rows; returns the position of a row outside the storage, or ALL_ROWS_VALID."""
        dim = any_dim if fixed == 0 else fixed
        wrong = ALL_ROWS_VALID
        count = rows.size if offsets is None else offsets.size - 1
        for sequence in range(count * thread // num_threads, count * (thread + 1) // num_threads):
            begin, end, target = sequence, sequence + 1, sequence
            if offsets is not None:
                begin, end = max(np.int64(offsets[sequence]), 0), min(np.int64(offsets[sequence + 1]), rows.size)
                target = sequence * max_length
                for place in range(target + max(end - begin, 0), target + max_length):
                    for column in range(dim):
                        out[place, column] = 0
            for n in range(begin, end):
                if n + PREFETCH_ROWS < rows.size:
                    for column in range(0, dim, line):
                        prefetch(weight, np.int64(rows[n + PREFETCH_ROWS]) * dim + column)
                row = np.int64(rows[n])
                if row < 0 or row >= num_rows:
                    wrong = n
                    continue
                for column in range(0, dim, width):
                    put(out, (target + n - begin) * dim + column, load(weight, row * dim + column))
        return wrong

    return copy
