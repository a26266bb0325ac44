"""Numba kernels: threads share the histories out by their positions; a query's scores stay in a row of one history's length."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit_for, share_of_histories
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "run"]


def run(q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float) -> Tensor:
    out_NHV = torch.empty_like(v_NHV)
    arrays = [as_numpy(value) for value in (q_NHA, k_NHA, v_NHV, position_M, offsets, out_NHV)]
    kernel = _attend_kernel(fixed_dim(q_NHA.shape[2]), fixed_dim(v_NHV.shape[2]))
    threads.run(kernel, threads.num_threads_for(16 * q_NHA.numel()), *arrays, np.float32(scale))
    return out_NHV


def backward(
    grad_NHV: Tensor, q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = torch.zeros_like(q_NHA), torch.zeros_like(k_NHA), torch.zeros_like(v_NHV)
    of_position_BM = torch.zeros(offsets.numel() - 1, position_M.numel())
    arrays = [as_numpy(value) for value in (grad_NHV, q_NHA, k_NHA, v_NHV, position_M, offsets, of_q, of_k, of_v, of_position_BM)]
    kernel = _backward_kernel(fixed_dim(q_NHA.shape[2]), fixed_dim(v_NHV.shape[2]))
    threads.run(kernel, threads.num_threads_for(16 * q_NHA.numel()), *arrays, np.float32(scale))
    return of_q, of_k, of_v, of_position_BM.sum(0)


@cache
def _attend_kernel(key_dim: int, value_dim: int) -> Any:
    keys, values = arithmetic(key_dim, torch.float32), arithmetic(value_dim, torch.float32)
    get, each, total_of, width = keys.get, keys.each, keys.total, keys.width
    get_v, put_v, each_v, width_v = values.get, values.put, values.each, values.width

    @jit_for(key_dim, value_dim)
    def attend(thread, num_threads, q, k, v, position, offsets, out, scale):
        num_heads, any_key, any_value = q.shape[1], q.shape[2], v.shape[2]
        dim = any_key if key_dim == 0 else key_dim
        dim_v = any_value if value_dim == 0 else value_dim
        last = position.size - 1
        first, end_history = share_of_histories(offsets, thread, num_threads)
        longest = np.int64(0)
        for history in range(first, end_history):
            longest = max(longest, np.int64(offsets[history + 1]) - np.int64(offsets[history]))
        weight = np.empty(longest, np.float32)
        one = np.float32(1)
        for history in range(first, end_history):
            begin, end = np.int64(offsets[history]), np.int64(offsets[history + 1])
            for n in range(begin, end):
                for head in range(num_heads):
                    row = (n * num_heads + head) * dim
                    for m in range(begin, n + 1):
                        other = (m * num_heads + head) * dim
                        dot = each(np.float32(0))
                        for column in range(0, dim, width):
                            dot = dot + get(q, row + column) * get(k, other + column)
                        score = total_of(dot) + position[min(n - m, last)]
                        weight[m - begin] = scale * score / (one + np.float32(math.exp(-score)))
                    own = (n * num_heads + head) * dim_v
                    for column in range(0, dim_v, width_v):
                        total = each_v(np.float32(0))
                        for m in range(begin, n + 1):
                            total = total + each_v(weight[m - begin]) * get_v(v, (m * num_heads + head) * dim_v + column)
                        put_v(out, own + column, total)

    return attend


@cache
def _backward_kernel(key_dim: int, value_dim: int) -> Any:
    keys, values = arithmetic(key_dim, torch.float32), arithmetic(value_dim, torch.float32)
    get, put, each, total_of, width = keys.get, keys.put, keys.each, keys.total, keys.width
    get_v, put_v, each_v, total_v, width_v = values.get, values.put, values.each, values.total, values.width

    @jit_for(key_dim, value_dim)
    def unattend(thread, num_threads, grad, q, k, v, position, offsets, of_q, of_k, of_v, of_position, scale):
        num_heads, any_key, any_value = q.shape[1], q.shape[2], v.shape[2]
        dim = any_key if key_dim == 0 else key_dim
        dim_v = any_value if value_dim == 0 else value_dim
        last = position.size - 1
        one = np.float32(1)
        first, end_history = share_of_histories(offsets, thread, num_threads)
        for history in range(first, end_history):
            begin, end = np.int64(offsets[history]), np.int64(offsets[history + 1])
            for n in range(begin, end):
                for head in range(num_heads):
                    row, row_v = (n * num_heads + head) * dim, (n * num_heads + head) * dim_v
                    for m in range(begin, n + 1):
                        other, other_v = (m * num_heads + head) * dim, (m * num_heads + head) * dim_v
                        dot = each(np.float32(0))
                        for column in range(0, dim, width):
                            dot = dot + get(q, row + column) * get(k, other + column)
                        distance = min(n - m, last)
                        score = total_of(dot) + position[distance]
                        gate = one / (one + np.float32(math.exp(-score)))
                        own_weight = each_v(scale * score * gate)
                        upstream = each_v(np.float32(0))
                        for column in range(0, dim_v, width_v):
                            of_out = get_v(grad, row_v + column)
                            upstream = upstream + of_out * get_v(v, other_v + column)
                            put_v(of_v, other_v + column, get_v(of_v, other_v + column) + own_weight * of_out)
                        of_score = total_v(upstream) * scale * gate * (one + score * (one - gate))
                        of_position[history, distance] += of_score
                        own = each(of_score)
                        for column in range(0, dim, width):
                            put(of_q, row + column, get(of_q, row + column) + own * get(k, other + column))
                            put(of_k, other + column, get(of_k, other + column) + own * get(q, row + column))

    return unattend
