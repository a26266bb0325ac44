"""Numba kernels: threads share the histories out by their positions, a target stays in the first cache while its history goes by."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit_for, share_of_histories
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "run"]


def run(query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> Tensor:
    num_keys, dim = key_ND.shape
    out = torch.empty(num_keys, 3 * dim)
    threads.run(
        _pair_kernel(fixed_dim(dim)),
        threads.num_threads_for(out.numel()),
        *(as_numpy(query_BD), as_numpy(key_ND), as_numpy(offsets), as_numpy(out), dim),
    )
    return out


def backward(grad: Tensor, query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    query_grad_BD, key_grad_ND = torch.empty_like(query_BD), torch.empty_like(key_ND)
    dim = key_ND.shape[1]
    threads.run(
        _backward_kernel(fixed_dim(dim)),
        threads.num_threads_for(2 * grad.numel()),
        *(as_numpy(tensor) for tensor in (grad, query_BD, key_ND, offsets, query_grad_BD, key_grad_ND)),
        dim,
    )
    return query_grad_BD, key_grad_ND


@cache
def _pair_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, put, width = ops.get, ops.put, ops.width

    @jit_for(fixed)
    def pair(thread, num_threads, query, key, offsets, out, any_dim):
        dim = any_dim if fixed == 0 else fixed
        first, last = share_of_histories(offsets, thread, num_threads)
        for history in range(first, last):
            for n in range(np.int64(offsets[history]), np.int64(offsets[history + 1])):
                target = 3 * dim * n
                for column in range(0, dim, width):
                    own = get(query, history * dim + column)
                    other = get(key, n * dim + column)
                    put(out, target + column, own)
                    put(out, target + dim + column, other)
                    put(out, target + 2 * dim + column, own * other)

    return pair


@cache
def _backward_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, put, each, width = ops.get, ops.put, ops.each, ops.width

    @jit_for(fixed)
    def unpair(thread, num_threads, grad, query, key, offsets, query_grad, key_grad, any_dim):
        dim = any_dim if fixed == 0 else fixed
        first, last = share_of_histories(offsets, thread, num_threads)
        for history in range(first, last):
            for column in range(0, dim, width):
                put(query_grad, history * dim + column, each(np.float32(0)))
            for n in range(np.int64(offsets[history]), np.int64(offsets[history + 1])):
                source = 3 * dim * n
                for column in range(0, dim, width):
                    own = history * dim + column
                    of_product = get(grad, source + 2 * dim + column)
                    put(key_grad, n * dim + column, get(grad, source + dim + column) + get(query, own) * of_product)
                    total = get(query_grad, own) + get(grad, source + column) + get(key, n * dim + column) * of_product
                    put(query_grad, own, total)

    return unpair
