"""Numba kernel of bags of any length: the next bags' rows are prefetched while one is summed."""

from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.embedding_bag.cpu_single import IDS_PER_SHARE, first_wrong, look_up
from ninerank.fusion.kernels.embedding_rows.cpu import VALID
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit_shares, prefetch, rows_ahead
from ninerank.fusion.kernels.lanes import arithmetic, row_buffer

__all__ = ["run"]


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
    if offsets is None:
        out, wrong = look_up(weight_RD, rows_N.contiguous(), sample_weight_N, num_features, feature_major)
        if wrong != VALID:
            raise_outside(wrong, rows_N, num_rows)
        return out
    num_bags = (offsets.numel() - 1) // num_features
    out = torch.empty((num_features, num_bags, dim) if feature_major else (num_bags, num_features, dim), dtype=torch.float32)
    optional = [None if tensor is None else as_numpy(tensor.contiguous()) for tensor in (offsets, _as_float(sample_weight_N), mean_F)]
    ids_per_bag = rows_N.numel() / max(1, num_features * num_bags)
    bags_ahead = max(1, round(rows_ahead(dim * weight_RD.itemsize) / max(1.0, ids_per_bag)))
    # Bags are shared out in the order of the output.
    most_shares = num_bags * (num_features if feature_major else 1)
    statuses = threads.run_shares(
        _kernel(fixed_dim(dim), weight_RD.dtype),
        threads.num_threads_for((rows_N.numel() + num_features * num_bags) * dim),
        max(1, min(most_shares, rows_N.numel() // IDS_PER_SHARE)),
        *(as_numpy(weight_RD), as_numpy(rows_N.contiguous()), *optional, as_numpy(out.view(-1, dim))),
        *(num_features, num_bags, num_rows, dim, feature_major, bags_ahead),
    )
    wrong = first_wrong(statuses)
    if wrong != VALID:
        raise_outside(wrong, rows_N, num_rows)
    return out


def raise_outside(position: int, rows_N: Tensor, num_rows: int) -> NoReturn:
    """Raise IndexError for the row at `position`."""
    raise IndexError(f"row {int(rows_N[position])} (number {position} of the lookup) is outside the storage of {num_rows} rows")


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


@cache
def _kernel(fixed: int, dtype: torch.dtype) -> Any:
    buffer = row_buffer(fixed)
    ops = arithmetic(fixed, dtype)
    load, get, put, each, width = ops.load, ops.get, ops.put, ops.each, ops.width
    line = CACHE_LINE_BYTES // dtype.itemsize

    @jit_shares(fixed, dtype)
    def pool(
        share, num_shares, weight, rows, offsets, sample_weight, mean, out,
        num_features, num_bags, num_rows, any_dim, feature_major, ahead
    ):  # fmt: skip
        """Pool this share's bags; returns the position of a row outside the storage, or VALID."""
        dim = any_dim if fixed == 0 else fixed
        total = buffer(any_dim)
        wrong = VALID
        # Outer and inner loop over bags in the order of the output; the same counters run `ahead` bags before.
        outer_count = num_features * num_bags if feature_major else num_bags
        inner_count = 1 if feature_major else num_features
        first_outer, end_outer = outer_count * share // num_shares, outer_count * (share + 1) // num_shares
        ahead_outer, ahead_inner = first_outer + ahead // inner_count, ahead % inner_count
        for outer in range(first_outer, end_outer):
            for inner in range(inner_count):
                if ahead_outer < end_outer:
                    bag = ahead_inner * num_bags + ahead_outer
                    begin, end = max(np.int64(offsets[bag]), 0), min(np.int64(offsets[bag + 1]), rows.size)
                    for n in range(begin, end):
                        for column in range(0, dim, line):
                            prefetch(weight, np.int64(rows[n]) * dim + column)
                    ahead_inner += 1
                    if ahead_inner == inner_count:
                        ahead_outer, ahead_inner = ahead_outer + 1, 0
                bag = inner * num_bags + outer
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
