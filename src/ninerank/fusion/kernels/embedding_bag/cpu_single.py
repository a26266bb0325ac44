"""Numba kernel where every bag holds one id: rows are copied, and ids may become rows on the way.

A share is so many bags that its rows stay in a core's cache between the pass that checks (or makes) them, several at a
time, and the one that reads the storage. Rows are prefetched a few bags ahead.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.embedding_rows.cpu import VALID, map_range
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit_inline, jit_shares, prefetch, rows_ahead
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["IDS_PER_SHARE", "first_wrong", "look_up"]

IDS_PER_SHARE = 8192
# Outputs from this size on go past the cache: before anyone reads them, most would have left it, and a line that is
# written whole need not be read first.
STREAMED_BYTES = 1 << 22


def look_up(
    weight_RD: Tensor,
    rows_N: Tensor,
    sample_weight_N: Tensor | None,
    num_features: int,
    feature_major: bool,
    ids: "tuple[np.ndarray[Any, Any], ...] | None" = None,
) -> tuple[Tensor, int]:
    """Output, and the first position of a row outside the storage or of an id that is refused, or VALID.

    rows_N is read, or written where `ids` are given: (values, first_row, num_rows, policy) as `embedding_rows` takes them, of tables
    that lie in the storage.
    """
    num_rows, dim = weight_RD.shape
    num_bags = rows_N.numel() // num_features
    out = torch.empty((num_features, num_bags, dim) if feature_major else (num_bags, num_features, dim), dtype=torch.float32)
    sample = None if sample_weight_N is None else as_numpy(sample_weight_N.to(torch.float32).contiguous())
    inner = 1 if feature_major else num_features
    # Bags are shared out in the order of the output.
    num_shares = max(1, min(rows_N.numel() // IDS_PER_SHARE, rows_N.numel() // inner))
    ahead = -(-rows_ahead(dim * weight_RD.itemsize) // inner)
    streams = fixed_dim(dim) > 1 and out.nbytes >= STREAMED_BYTES
    statuses = threads.run_shares(
        _kernel(fixed_dim(dim), weight_RD.dtype, streams),
        threads.num_threads_for(2 * rows_N.numel() * dim),
        num_shares,
        *(as_numpy(weight_RD), ids, as_numpy(rows_N), sample, as_numpy(out.view(-1, dim))),
        *(num_features, num_bags, num_rows, dim, feature_major, ahead),
    )
    return out, first_wrong(statuses)


def first_wrong(statuses: "np.ndarray[Any, np.dtype[np.int64]]") -> int:
    """The least position among statuses of shares, or VALID."""
    wrong = statuses[statuses != VALID]
    return int(wrong.min()) if wrong.size else VALID


@cache
def _kernel(fixed: int, dtype: torch.dtype, streams: bool) -> Any:
    ops = arithmetic(fixed, dtype)
    load, each, width, line = ops.load, ops.each, ops.width, CACHE_LINE_BYTES // dtype.itemsize
    write = ops.stream if streams else ops.put

    @jit_inline
    def copy(weight, row, sample_weight, n, out, target, any_dim):
        dim = any_dim if fixed == 0 else fixed
        if sample_weight is None:
            for column in range(0, dim, width):
                write(out, target + column, load(weight, row * dim + column))
        else:
            factor = each(sample_weight[n])
            for column in range(0, dim, width):
                write(out, target + column, factor * load(weight, row * dim + column))

    @jit_shares(fixed, dtype, streams)
    def pool_single(
        share, num_shares, weight, ids, rows, sample_weight, out,
        num_features, num_bags, num_rows, any_dim, feature_major, ahead
    ):  # fmt: skip
        """Look this share's bags up; returns the first position that is wrong, or VALID."""
        dim = any_dim if fixed == 0 else fixed
        count = num_features * num_bags if feature_major else num_bags
        first, end = count * share // num_shares, count * (share + 1) // num_shares
        for feature in range(num_features):
            begin, stop = feature * num_bags + first, feature * num_bags + end
            if feature_major:
                begin, stop = max(first, feature * num_bags), min(end, (feature + 1) * num_bags)
            if begin >= stop:
                continue
            if ids is None:
                wrong = _check_range(rows, begin, stop, num_rows)
            else:
                values, first_row, table_rows, policy = ids
                wrong = map_range(values, rows, begin, stop, first_row[feature], table_rows[feature], policy[feature])
            if wrong != VALID:
                return wrong
        if feature_major:
            for n in range(first, end):
                next_row = np.int64(rows[min(n + ahead, end - 1)])
                for column in range(0, dim, line):
                    prefetch(weight, next_row * dim + column)
                copy(weight, np.int64(rows[n]), sample_weight, n, out, n * dim, any_dim)
        else:
            for bag in range(first, end):
                next_bag = min(bag + ahead, end - 1)
                for feature in range(num_features):
                    n = feature * num_bags + bag
                    next_row = np.int64(rows[feature * num_bags + next_bag])
                    for column in range(0, dim, line):
                        prefetch(weight, next_row * dim + column)
                    copy(weight, np.int64(rows[n]), sample_weight, n, out, (bag * num_features + feature) * dim, any_dim)
        return VALID

    return pool_single


@jit_inline
def _check_range(rows, begin, end, num_rows):
    """First position of a row outside the storage, or VALID."""
    num_outside = 0
    for n in range(begin, end):
        num_outside += (rows[n] < 0) | (rows[n] >= num_rows)
    if num_outside > 0:
        for n in range(begin, end):
            if rows[n] < 0 or rows[n] >= num_rows:
                return n
    return VALID
