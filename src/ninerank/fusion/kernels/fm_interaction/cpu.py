"""Numba kernels: threads share the rows out; the sum of a row's fields stays in registers, some columns at a time."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit_for
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "run"]


def run(fields_BFD: Tensor) -> Tensor:
    out_B1 = torch.empty(fields_BFD.shape[0], 1)
    kernel = _sum_kernel(fixed_dim(fields_BFD.shape[2]))
    threads.run(kernel, threads.num_threads_for(fields_BFD.numel()), as_numpy(fields_BFD), as_numpy(out_B1))
    return out_B1


def backward(grad_B1: Tensor, fields_BFD: Tensor) -> Tensor:
    grad_BFD = torch.empty_like(fields_BFD)
    kernel = _backward_kernel(fixed_dim(fields_BFD.shape[2]))
    threads.run(kernel, threads.num_threads_for(2 * fields_BFD.numel()), *map(as_numpy, (grad_B1, fields_BFD, grad_BFD)))
    return grad_BFD


@cache
def _sum_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, each, total_of, width = ops.get, ops.each, ops.total, ops.width

    @jit_for(fixed)
    def interact(thread, num_threads, fields, out):
        num_rows, num_fields, any_dim = fields.shape
        dim = any_dim if fixed == 0 else fixed
        for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
            result = each(np.float32(0))
            for column in range(0, dim, width):
                total, squares = each(np.float32(0)), each(np.float32(0))
                for field in range(num_fields):
                    value = get(fields, (row * num_fields + field) * dim + column)
                    total = total + value
                    squares = squares + value * value
                result = result + (total * total - squares)
            out[row, 0] = np.float32(0.5) * total_of(result)

    return interact


@cache
def _backward_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, put, each, width = ops.get, ops.put, ops.each, ops.width

    @jit_for(fixed)
    def differentiate(thread, num_threads, grad, fields, fields_grad):
        num_rows, num_fields, any_dim = fields.shape
        dim = any_dim if fixed == 0 else fixed
        for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
            upstream = each(grad[row, 0])
            for column in range(0, dim, width):
                total = each(np.float32(0))
                for field in range(num_fields):
                    total = total + get(fields, (row * num_fields + field) * dim + column)
                for field in range(num_fields):
                    place = (row * num_fields + field) * dim + column
                    put(fields_grad, place, upstream * (total - get(fields, place)))

    return differentiate
