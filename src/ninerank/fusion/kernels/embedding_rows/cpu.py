"""Numba kernel: one pass over the ids."""

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.embedding_rows import IdRangeError, OutOfRange, row_dtype
from ninerank.fusion.kernels.jit import as_numpy, jit

__all__ = ["run"]

NONE_REFUSED = -1
ERROR, CLAMP = int(OutOfRange.ERROR), int(OutOfRange.CLAMP)


def run(
    values_N: Tensor, offsets: Tensor | None, first_row_F: Tensor, num_rows_F: Tensor, policy_F: Tensor | None, num_storage_rows: int
) -> Tensor:
    rows_N = torch.empty(values_N.shape, dtype=row_dtype(num_storage_rows))
    num_features = first_row_F.numel()
    policy = np.zeros(num_features, np.uint8) if policy_F is None else as_numpy(policy_F.contiguous())
    values, first_row, num_rows = (as_numpy(tensor.contiguous()) for tensor in (values_N, first_row_F, num_rows_F))
    start = None if offsets is None else as_numpy(offsets.contiguous())
    if start is not None and start[-1] != values.size:
        raise ValueError(f"offsets end at {start[-1]}, there are {values.size} ids")
    refused = min(
        (
            position
            for position in threads.run(
                _map_ids, threads.num_threads_for(values_N.numel()), values, start, first_row, num_rows, policy, as_numpy(rows_N)
            )
            if position != NONE_REFUSED
        ),
        default=NONE_REFUSED,
    )
    if refused != NONE_REFUSED:
        feature = _feature_at(refused, values.size, start, num_features)
        raise IdRangeError(feature, int(values[refused]), int(num_rows[feature]), refused)
    return rows_N


def _feature_at(position: int, num_values: int, start: "np.ndarray | None", num_features: int) -> int:
    if start is None:
        return position * num_features // num_values
    bounds = start[:: (start.size - 1) // num_features]
    return int(np.searchsorted(bounds, position, side="right")) - 1


@jit
def _map_ids(thread, num_threads, values, offsets, first_row, num_rows, policy, rows):
    """Map this thread's share; returns the first refused position, or NONE_REFUSED."""
    num_features = first_row.size
    low, high = values.size * thread // num_threads, values.size * (thread + 1) // num_threads
    refused = NONE_REFUSED
    for feature in range(num_features):
        if offsets is None:
            begin, end = values.size // num_features * feature, values.size // num_features * (feature + 1)
        else:
            bags = (offsets.size - 1) // num_features
            begin, end = np.int64(offsets[bags * feature]), np.int64(offsets[bags * (feature + 1)])
        begin, end = max(begin, low), min(end, high)
        first, size, rule = first_row[feature], num_rows[feature], policy[feature]
        # Without a branch, so that the usual case runs several ids at a time.
        num_outside = 0
        for n in range(begin, end):
            id_ = np.int64(values[n])
            num_outside += (id_ < 0) | (id_ >= size)
            rows[n] = first + id_
        if num_outside > 0:
            for n in range(begin, end):
                id_ = np.int64(values[n])
                if id_ < 0 or id_ >= size:
                    if rule == ERROR and refused == NONE_REFUSED:
                        refused = n
                    rows[n] = first + (min(max(id_, 0), size - 1) if rule == CLAMP else 0)
    return refused
