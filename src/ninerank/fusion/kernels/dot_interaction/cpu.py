"""Numba kernels: threads share the rows out; a row's fields stay in the first cache."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.dot_interaction import num_pairs
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit_for
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "run"]


def run(fields_BFD: Tensor) -> Tensor:
    num_rows, num_fields, dim = fields_BFD.shape
    out_BP = torch.empty(num_rows, num_pairs(num_fields))
    num_threads = threads.num_threads_for(out_BP.numel() * dim // 4)
    threads.run(_dot_kernel(fixed_dim(dim)), num_threads, as_numpy(fields_BFD), as_numpy(out_BP))
    return out_BP


def backward(grad_BP: Tensor, fields_BFD: Tensor) -> Tensor:
    grad_BFD = torch.empty_like(fields_BFD)
    dim = fields_BFD.shape[2]
    num_threads = threads.num_threads_for(grad_BP.numel() * dim // 2)
    threads.run(_backward_kernel(fixed_dim(dim)), num_threads, *map(as_numpy, (grad_BP, fields_BFD, grad_BFD)))
    return grad_BFD


@cache
def _dot_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, each, total_of, width = ops.get, ops.each, ops.total, ops.width

    @jit_for(fixed)
    def interact(thread, num_threads, fields, out):
        num_rows, num_fields, any_dim = fields.shape
        dim = any_dim if fixed == 0 else fixed
        for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
            first, pair = row * num_fields * dim, 0
            for field in range(1, num_fields):
                for other in range(field):
                    dot = each(np.float32(0))
                    for column in range(0, dim, width):
                        dot = dot + get(fields, first + field * dim + column) * get(fields, first + other * dim + column)
                    out[row, pair] = total_of(dot)
                    pair += 1

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
            first = row * num_fields * dim
            for field in range(num_fields):
                for column in range(0, dim, width):
                    total = each(np.float32(0))
                    pair = field * (field - 1) // 2
                    for other in range(field):
                        total = total + each(grad[row, pair + other]) * get(fields, first + other * dim + column)
                    for other in range(field + 1, num_fields):
                        own = grad[row, other * (other - 1) // 2 + field]
                        total = total + each(own) * get(fields, first + other * dim + column)
                    put(fields_grad, first + field * dim + column, total)

    return differentiate
