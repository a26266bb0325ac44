"""Numba kernels: threads share the histories out by their positions; a history's sum stays in registers, some columns at a time."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit, jit_for, share_of_histories
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "run"]


def run(score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> Tensor:
    dim = key_ND.shape[1]
    out_BD = torch.empty(offsets.numel() - 1, dim)
    num_threads = threads.num_threads_for(key_ND.numel())
    weight_N = _weights(score_N, offsets, softmax, num_threads)
    threads.run(
        *(_sum_kernel(fixed_dim(dim)), num_threads),
        *(as_numpy(weight_N), as_numpy(key_ND), as_numpy(offsets), as_numpy(out_BD), dim),
    )
    return out_BD


def backward(grad_BD: Tensor, score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    score_grad_N, key_grad_ND = torch.empty_like(score_N), torch.empty_like(key_ND)
    dim = key_ND.shape[1]
    num_threads = threads.num_threads_for(2 * key_ND.numel())
    weight_N = _weights(score_N, offsets, softmax, num_threads)
    threads.run(
        *(_backward_kernel(fixed_dim(dim)), num_threads),
        *(as_numpy(tensor) for tensor in (grad_BD, weight_N, key_ND, offsets, score_grad_N, key_grad_ND)),
        *(dim, softmax),
    )
    return score_grad_N, key_grad_ND


def _weights(score_N: Tensor, offsets: Tensor, softmax: bool, num_threads: int) -> Tensor:
    if not softmax:
        return score_N
    weight_N = torch.empty_like(score_N)
    threads.run(_normalise, num_threads, as_numpy(score_N), as_numpy(offsets), as_numpy(weight_N))
    return weight_N


@jit
def _normalise(thread, num_threads, score, offsets, weight):
    first, last = share_of_histories(offsets, thread, num_threads)
    for history in range(first, last):
        begin, end = np.int64(offsets[history]), np.int64(offsets[history + 1])
        if begin == end:
            continue
        greatest = score[begin]
        for n in range(begin + 1, end):
            # Written so that NaN is kept.
            if not score[n] <= greatest:
                greatest = score[n]
        total = np.float32(0)
        for n in range(begin, end):
            weight[n] = np.float32(math.exp(score[n] - greatest))
            total += weight[n]
        for n in range(begin, end):
            weight[n] /= total


@cache
def _sum_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, put, each, width = ops.get, ops.put, ops.each, ops.width

    @jit_for(fixed)
    def weigh(thread, num_threads, weight, key, offsets, out, any_dim):
        dim = any_dim if fixed == 0 else fixed
        first, last = share_of_histories(offsets, thread, num_threads)
        for history in range(first, last):
            begin, end = np.int64(offsets[history]), np.int64(offsets[history + 1])
            for column in range(0, dim, width):
                total = each(np.float32(0))
                for n in range(begin, end):
                    total = total + each(weight[n]) * get(key, n * dim + column)
                put(out, history * dim + column, total)

    return weigh


@cache
def _backward_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, put, each, total_of, width = ops.get, ops.put, ops.each, ops.total, ops.width

    @jit_for(fixed)
    def unweigh(thread, num_threads, grad, weight, key, offsets, score_grad, key_grad, any_dim, softmax):
        dim = any_dim if fixed == 0 else fixed
        first, last = share_of_histories(offsets, thread, num_threads)
        for history in range(first, last):
            begin, end = np.int64(offsets[history]), np.int64(offsets[history + 1])
            mean = np.float32(0)
            for n in range(begin, end):
                dot = each(np.float32(0))
                own = each(weight[n])
                for column in range(0, dim, width):
                    of_out = get(grad, history * dim + column)
                    dot = dot + of_out * get(key, n * dim + column)
                    put(key_grad, n * dim + column, own * of_out)
                score_grad[n] = total_of(dot)
                mean += weight[n] * score_grad[n]
            if softmax:
                for n in range(begin, end):
                    score_grad[n] = weight[n] * (score_grad[n] - mean)

    return unweigh
