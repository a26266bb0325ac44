"""Numba kernel: radix sort by row, then one sum a segment; each thread has a range of rows of its own."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit, jit_for, jit_inline, prefetch, rows_ahead
from ninerank.fusion.kernels.lanes import arithmetic, row_buffer
from ninerank.fusion.kernels.radix import SORTED, sort_share

__all__ = ["optional_arrays", "raise_outside", "run", "segment_sum"]

FLOAT_LINE = CACHE_LINE_BYTES // 4


def run(grad_GD: Tensor, rows_N: Tensor, grad_row_N: Tensor | None, scale_N: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    dim = grad_GD.shape[1]
    rows, grad = as_numpy(rows_N.contiguous()), as_numpy(grad_GD.to(torch.float32))
    grad_row, scale = optional_arrays(grad_row_N, scale_N, grad_GD.shape[0])
    shares = threads.run(sort_entries, threads.num_threads_for(rows.size * dim), rows, grad_row, scale, num_rows)
    raise_outside([share[0] for share in shares], rows, num_rows)
    ends = np.cumsum([share[3] for share in shares])
    unique_U = torch.empty(int(ends[-1]), dtype=rows_N.dtype)
    sums_UD = torch.empty(int(ends[-1]), dim)
    unique, sums = as_numpy(unique_U), as_numpy(sums_UD)
    threads.run_each(
        _kernel(fixed_dim(dim)),
        [
            (keys, carried, end - count, grad, grad_row, scale, dim, unique, sums)
            for (_, keys, carried, count), end in zip(shares, ends, strict=True)
        ],
    )
    return unique_U, sums_UD


def optional_arrays(grad_row_N: Tensor | None, scale_N: Tensor | None, num_outputs: int) -> tuple[Any, Any]:
    """Arrays of what an entry may carry; raises IndexError for an output that is not there."""
    scale = None if scale_N is None else as_numpy(scale_N.to(torch.float32).contiguous())
    if grad_row_N is None:
        return None, scale
    grad_row = as_numpy(grad_row_N.contiguous())
    if grad_row.size and not 0 <= grad_row.min() <= grad_row.max() < num_outputs:
        raise IndexError(f"entries go into outputs {grad_row.min()} to {grad_row.max()}; there are {num_outputs}")
    return grad_row, scale


def raise_outside(positions: list[int], rows: "np.ndarray[Any, np.dtype[Any]]", num_rows: int) -> None:
    """Raise IndexError where a sort met a row that the storage does not have."""
    for position in positions:
        if position != SORTED:
            raise IndexError(f"row {rows[position]} (number {position} of the entries) is outside the storage of {num_rows} rows")


@jit
def sort_entries(thread, num_threads, rows, grad_row, scale, num_rows):
    """(status, keys, carried, number of distinct keys) of this thread's range of rows.

    Carried is the output an entry went into; with scales, which belong to entries, the entry's position.
    """
    status, keys, carried = sort_share(rows, grad_row if scale is None else None, num_rows, thread, num_threads)
    distinct = 0
    for n in range(keys.size):
        if n == 0 or keys[n] != keys[n - 1]:
            distinct += 1
    return status, keys, carried, distinct


@cache
def segment_sum(fixed: int) -> Any:
    """Compiled `sum(total, begin, keys, carried, grad, grad_row, scale, any_dim) -> end`: total = sum of a row's entries."""

    entries_ahead = rows_ahead(4 * fixed) if fixed else 8
    ops = arithmetic(fixed, torch.float32)
    get, put, each, width = ops.get, ops.put, ops.each, ops.width

    @jit_inline
    def add_up(total, begin, keys, carried, grad, grad_row, scale, any_dim):
        dim = any_dim if fixed == 0 else fixed
        row, last = keys[begin], keys.size - 1
        n = begin
        while True:
            # Every entry brings one of those ahead nearer.
            later = min(n + entries_ahead, last)
            entry = np.int64(carried[later])
            output = entry
            if scale is not None and grad_row is not None:
                output = np.int64(grad_row[entry])
            for column in range(0, dim, FLOAT_LINE):
                prefetch(grad, output * dim + column)
            entry = np.int64(carried[n])
            output = entry
            if scale is None:
                if n == begin:
                    for column in range(0, dim, width):
                        put(total, column, get(grad, output * dim + column))
                else:
                    for column in range(0, dim, width):
                        put(total, column, get(total, column) + get(grad, output * dim + column))
            else:
                factor = each(scale[entry])
                if grad_row is not None:
                    output = np.int64(grad_row[entry])
                if n == begin:
                    for column in range(0, dim, width):
                        put(total, column, factor * get(grad, output * dim + column))
                else:
                    for column in range(0, dim, width):
                        put(total, column, get(total, column) + factor * get(grad, output * dim + column))
            n += 1
            if n > last or keys[n] != row:
                return n

    return add_up


@cache
def _kernel(fixed: int) -> Any:
    add_up, buffer = segment_sum(fixed), row_buffer(fixed)
    ops = arithmetic(fixed, torch.float32)
    get, put, width = ops.get, ops.put, ops.width

    @jit_for(fixed)
    def reduce_share(keys, carried, first, grad, grad_row, scale, any_dim, unique, sums):
        """Write this thread's sums from place `first` on."""
        dim = any_dim if fixed == 0 else fixed
        total = buffer(any_dim)
        begin, place = 0, first
        while begin < keys.size:
            unique[place] = keys[begin]
            begin = add_up(total, begin, keys, carried, grad, grad_row, scale, any_dim)
            for column in range(0, dim, width):
                put(sums, place * dim + column, get(total, column))
            place += 1

    return reduce_share
