"""Numba kernel: one pass over the ids."""

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.embedding_rows import IdRangeError, OutOfRange, row_dtype
from ninerank.fusion.kernels.jit import as_numpy, jit, jit_inline

__all__ = ["VALID", "id_arrays", "map_range", "raise_refused", "run"]

VALID = -1
ERROR, CLAMP = int(OutOfRange.ERROR), int(OutOfRange.CLAMP)


def run(
    values_N: Tensor, offsets: Tensor | None, first_row_F: Tensor, num_rows_F: Tensor, policy_F: Tensor | None, num_storage_rows: int
) -> Tensor:
    rows_N = torch.empty(values_N.shape, dtype=row_dtype(num_storage_rows))
    values, *tables = id_arrays(values_N, first_row_F, num_rows_F, policy_F)
    start = None if offsets is None else as_numpy(offsets.contiguous())
    if start is not None and start[-1] != values.size:
        raise ValueError(f"offsets end at {start[-1]}, there are {values.size} ids")
    refused = [
        position
        for position in threads.run(_map_ids, threads.num_threads_for(values_N.numel()), values, start, *tables, as_numpy(rows_N))
        if position != VALID
    ]
    if refused:
        raise_refused(min(refused), values, start, tables[1])
    return rows_N


def id_arrays(values_N: Tensor, first_row_F: Tensor, num_rows_F: Tensor, policy_F: Tensor | None) -> "tuple[np.ndarray[Any, Any], ...]":
    """Arrays (ids, first row, rows and policy of each feature)."""
    policy = np.zeros(first_row_F.numel(), np.uint8) if policy_F is None else as_numpy(policy_F.contiguous())
    return *(as_numpy(tensor.contiguous()) for tensor in (values_N, first_row_F, num_rows_F)), policy


def raise_refused(
    position: int, values: "np.ndarray[Any, Any]", start: "np.ndarray[Any, Any] | None", num_rows: "np.ndarray[Any, Any]"
) -> NoReturn:
    """Raise IdRangeError for the id at `position`. start: of each bag, None where each holds one id."""
    if start is None:
        feature = position * num_rows.size // values.size
    else:
        feature = int(np.searchsorted(start[:: (start.size - 1) // num_rows.size], position, side="right")) - 1
    raise IdRangeError(feature, int(values[position]), int(num_rows[feature]), position)


@jit_inline
def map_range(values, rows, begin, end, first, size, rule):
    """Rows of the ids at begin ... end - 1, all of one feature; returns the first refused position, or VALID."""
    # Without a branch, so that the usual case runs several ids at a time.
    num_outside = 0
    for n in range(begin, end):
        id_ = np.int64(values[n])
        num_outside += (id_ < 0) | (id_ >= size)
        rows[n] = first + id_
    refused = VALID
    if num_outside > 0:
        for n in range(begin, end):
            id_ = np.int64(values[n])
            if id_ < 0 or id_ >= size:
                if rule == ERROR and refused == VALID:
                    refused = n
                rows[n] = first + (min(max(id_, 0), size - 1) if rule == CLAMP else 0)
    return refused


@jit
def _map_ids(thread, num_threads, values, offsets, first_row, num_rows, policy, rows):
    """Map this thread's share; returns the first refused position, or VALID."""
    num_features = first_row.size
    low, high = values.size * thread // num_threads, values.size * (thread + 1) // num_threads
    refused = VALID
    for feature in range(num_features):
        if offsets is None:
            begin, end = values.size // num_features * feature, values.size // num_features * (feature + 1)
        else:
            bags = (offsets.size - 1) // num_features
            begin, end = np.int64(offsets[bags * feature]), np.int64(offsets[bags * (feature + 1)])
        found = map_range(values, rows, max(begin, low), min(end, high), first_row[feature], num_rows[feature], policy[feature])
        if refused == VALID:
            refused = found
    return refused
