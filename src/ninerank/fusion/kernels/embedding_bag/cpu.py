"""Numba kernel: threads share the bags out, the next bags' rows are prefetched while one is summed."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit_for, prefetch, rows_ahead
from ninerank.fusion.kernels.lanes import arithmetic, row_buffer

__all__ = ["run"]

ALL_ROWS_VALID = -1


def run(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
) -> Tensor:
    num_rows, dim = weight_RD.shape
    num_bags = (rows_N.numel() if offsets is None else offsets.numel() - 1) // num_features
    out = torch.empty((num_features, num_bags, dim) if feature_major else (num_bags, num_features, dim), dtype=torch.float32)
    optional = [None if tensor is None else as_numpy(tensor.contiguous()) for tensor in (offsets, _as_float(sample_weight_N), mean_F)]
    ids_per_bag = rows_N.numel() / max(1, num_features * num_bags)
    bags_ahead = max(1, round(rows_ahead(dim * weight_RD.itemsize) / max(1.0, ids_per_bag)))
    wrong = threads.run(
        _kernel(fixed_dim(dim), weight_RD.dtype),
        threads.num_threads_for((rows_N.numel() + num_features * num_bags) * dim),
        *(as_numpy(weight_RD), as_numpy(rows_N.contiguous()), *optional, as_numpy(out.view(-1, dim))),
        *(num_features, num_bags, num_rows, dim, feature_major, bags_ahead),
    )
    for position in wrong:
        if position != ALL_ROWS_VALID:
            raise IndexError(f"row {int(rows_N[position])} (number {position} of the lookup) is outside the storage of {num_rows} rows")
    return out


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


@cache
def _kernel(fixed: int, dtype: torch.dtype) -> Any:
    buffer = row_buffer(fixed)
    ops = arithmetic(fixed, dtype)
    load, get, put, each, width = ops.load, ops.get, ops.put, ops.each, ops.width
    line = CACHE_LINE_BYTES // dtype.itemsize

    @jit_for(fixed, dtype)
    def pool(
        thread,
        num_threads,
        weight,
        rows,
        offsets,
        sample_weight,
        mean,
        out,
        num_features,
        num_bags,
        num_rows,
        any_dim,
        feature_major,
        ahead,
    ):
        """Pool this thread's bags; returns the position of a row outside the storage, or ALL_ROWS_VALID."""
        dim = any_dim if fixed == 0 else fixed
        total = buffer(any_dim)
        wrong = ALL_ROWS_VALID
        # Outer and inner loop over bags in the order of the output; the same counters run `ahead` bags before.
        outer_count = num_features * num_bags if feature_major else num_bags
        inner_count = 1 if feature_major else num_features
        first_outer, end_outer = outer_count * thread // num_threads, outer_count * (thread + 1) // num_threads
        ahead_outer, ahead_inner = first_outer + ahead // inner_count, ahead % inner_count
        for outer in range(first_outer, end_outer):
            for inner in range(inner_count):
                if ahead_outer < end_outer:
                    bag = ahead_inner * num_bags + ahead_outer
                    begin, end = bag, bag + 1
                    if offsets is not None:
                        begin, end = max(np.int64(offsets[bag]), 0), min(np.int64(offsets[bag + 1]), rows.size)
                    for n in range(begin, end):
                        for column in range(0, dim, line):
                            prefetch(weight, np.int64(rows[n]) * dim + column)
                    ahead_inner += 1
                    if ahead_inner == inner_count:
                        ahead_outer, ahead_inner = ahead_outer + 1, 0
                bag = inner * num_bags + outer
                begin, end = bag, bag + 1
                if offsets is not None:
                    begin, end = max(np.int64(offsets[bag]), 0), min(np.int64(offsets[bag + 1]), rows.size)
                scale = np.float32(1)
                if mean is not None and mean[bag // num_bags] and end > begin:
                    scale = np.float32(1) / np.float32(end - begin)
                for column in range(0, dim, width):
                    put(total, column, each(np.float32(0)))
                for n in range(begin, end):
                    row = np.int64(rows[n])
                    if row < 0 or row >= num_rows:
                        wrong = n
                        continue
                    if mean is None and sample_weight is None:
                        for column in range(0, dim, width):
                            put(total, column, get(total, column) + load(weight, row * dim + column))
                    else:
                        factor = scale
                        if sample_weight is not None:
                            factor *= sample_weight[n]
                        for column in range(0, dim, width):
                            put(total, column, get(total, column) + each(factor) * load(weight, row * dim + column))
                target = (outer * inner_count + inner) * dim
                for column in range(0, dim, width):
                    put(out, target + column, get(total, column))
        return wrong

    return pool
