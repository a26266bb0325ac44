"""Numba kernel: sort by row, then sum, clip, update and write each row while it is in cache."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.embedding_reduce.cpu import optional_arrays, raise_outside, segment_sum, sort_entries
from ninerank.fusion.kernels.embedding_update.cpu_rules import RULES, bias_corrections
from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, as_numpy, fixed_dim, jit_for, prefetch, rows_ahead
from ninerank.fusion.kernels.lanes import arithmetic, row_buffer
from ninerank.fusion.kernels.radix import SORTED

__all__ = ["run"]

NO_STATE = np.zeros(0, np.float32)
NO_STEPS = np.zeros(0, np.int32)


def run(
    weight_RD: Tensor,
    state: list[Tensor],
    grad_GD: Tensor,
    rows_N: Tensor,
    grad_row_N: Tensor | None,
    scale_N: Tensor | None,
    first_row_T: Tensor,
    lr_T: Tensor,
    grad_scale: Tensor | None,
    optimizer: str,
    hyper: list[float],
) -> None:
    num_rows, dim = weight_RD.shape
    rows = as_numpy(rows_N.contiguous())
    grad_row, scale = optional_arrays(grad_row_N, scale_N, grad_GD.shape[0])
    floats = [as_numpy(tensor) for tensor in state if tensor.dtype == torch.float32]
    first, second = (*floats, NO_STATE, NO_STATE)[:2]
    steps = next((as_numpy(tensor) for tensor in state if tensor.dtype == torch.int32), NO_STEPS)
    scale_all = np.float32(1.0 if grad_scale is None else grad_scale.item())
    limits, constants = np.array(hyper[:3], np.float32), np.array(hyper[3:], np.float64)
    corrections = bias_corrections(tuple(constants)) if optimizer == "adam" else NO_STATE
    ahead = rows_ahead(dim * weight_RD.itemsize + sum(tensor[:1].nbytes for tensor in state))
    statuses = threads.run(
        _kernel(optimizer, fixed_dim(dim), weight_RD.dtype),
        threads.num_threads_for(rows.size * dim),
        *(as_numpy(weight_RD), first, second, steps, as_numpy(grad_GD.to(torch.float32)), rows, grad_row, scale),
        *(as_numpy(first_row_T), as_numpy(lr_T.to(torch.float32)), scale_all, limits, constants, corrections, num_rows, dim, ahead),
    )
    raise_outside(statuses, rows, num_rows)


@cache
def _kernel(optimizer: str, fixed: int, dtype: torch.dtype) -> Any:
    add_up, buffer = segment_sum(fixed), row_buffer(fixed)
    ops = arithmetic(fixed, dtype)
    apply = RULES[optimizer](fixed, ops)
    load, get, put, each, width = ops.load, ops.get, ops.put, ops.each, ops.width
    at_least, at_most, sum_of = ops.at_least, ops.at_most, ops.total
    line = CACHE_LINE_BYTES // dtype.itemsize
    float_line = CACHE_LINE_BYTES // 4
    has_first, has_second, has_steps = optimizer != "sgd", optimizer in ("adam", "ftrl"), optimizer == "adam"

    @jit_for(optimizer, fixed, dtype)
    def update(
        thread, num_threads, weight, first, second, steps, grad, rows, grad_row, scale,
        first_row, lr, grad_scale, limits, constants, corrections, num_rows, any_dim, ahead
    ):  # fmt: skip
        """Update this thread's range of rows; returns SORTED, or the position of a row outside the storage."""
        dim = any_dim if fixed == 0 else fixed
        status, keys, carried, _ = sort_entries(thread, num_threads, rows, grad_row, scale, num_rows)
        if status != SORTED:
            return status
        weight_decay, max_gradient, max_row_norm = limits[0], limits[1], limits[2]
        clips_values, clips_norm = max_gradient < np.inf, max_row_norm < np.inf
        total = buffer(any_dim)
        first_columns = (1 if optimizer == "rowwise_adagrad" else dim) if has_first else 0
        second_columns = dim if has_second else 0
        table = 0
        begin = 0
        while begin < keys.size:
            row = np.int64(keys[begin])
            end = add_up(total, begin, keys, carried, grad, grad_row, scale, any_dim)
            for later in range(begin + ahead, min(end + ahead, keys.size)):
                next_row = np.int64(keys[later])
                for column in range(0, dim, line):
                    prefetch(weight, next_row * dim + column)
                for column in range(0, first_columns, float_line):
                    prefetch(first, next_row * first_columns + column)
                for column in range(0, second_columns, float_line):
                    prefetch(second, next_row * second_columns + column)
                if has_steps:
                    prefetch(steps, next_row)
            begin = end
            while table + 1 < first_row.size and row >= first_row[table + 1]:
                table += 1
            if grad_scale != np.float32(1):
                for column in range(0, dim, width):
                    put(total, column, get(total, column) * each(grad_scale))
            if clips_values:
                for column in range(0, dim, width):
                    put(total, column, at_most(at_least(get(total, column), each(-max_gradient)), each(max_gradient)))
            if clips_norm:
                squares = each(np.float32(0))
                for column in range(0, dim, width):
                    squares = squares + get(total, column) * get(total, column)
                norm = math.sqrt(sum_of(squares))
                if norm > max_row_norm:
                    shrink = np.float32(max_row_norm / norm)
                    for column in range(0, dim, width):
                        put(total, column, get(total, column) * each(shrink))
            if weight_decay != np.float32(0):
                for column in range(0, dim, width):
                    put(total, column, get(total, column) + each(weight_decay) * load(weight, row * dim + column))
            apply(weight, first, second, steps, total, row, lr[table], constants, corrections, any_dim)
        return SORTED

    return update
