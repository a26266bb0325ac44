"""Numba kernel: threads share the rows out; several columns at once, the exponential as a polynomial in registers."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit_for
from ninerank.fusion.kernels.lanes import arithmetic, exponential

__all__ = ["backward", "run"]

BLOCK_ROWS = 128


def run(x: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor, bf16_out: bool) -> Tensor:
    dim = x.shape[-1]
    out = torch.empty_like(x, dtype=torch.bfloat16 if bf16_out else torch.float32)
    vectors = [as_numpy(vector.to(torch.float32).contiguous()) for vector in (shift_D, scale_D, base_D, slope_D)]
    threads.run(
        _kernel(fixed_dim(dim), x.dtype, out.dtype),
        threads.num_threads_for(x.numel()),
        *(as_numpy(x.view(-1, dim)), *vectors, as_numpy(out.view(-1, dim))),
    )
    return out


def backward(grad_ND: Tensor, x_ND: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, dim = x_ND.shape
    x_grad_ND, sums_P4D = torch.empty_like(x_ND), torch.zeros(-(-num_rows // BLOCK_ROWS), 4, dim)
    arrays = [as_numpy(value) for value in (grad_ND, x_ND, shift_D, scale_D, base_D, slope_D, x_grad_ND, sums_P4D)]
    threads.run(_backward_kernel(fixed_dim(dim)), threads.num_threads_for(3 * x_ND.numel()), *arrays)
    return x_grad_ND, sums_P4D.sum(0)


@cache
def _kernel(fixed: int, dtype: torch.dtype, out_dtype: torch.dtype) -> Any:
    taken, given = arithmetic(fixed, dtype), arithmetic(fixed, out_dtype)
    load, store, get, each, width = taken.load, given.store, taken.get, taken.each, taken.width
    exp = exponential(fixed)

    @jit_for(fixed, dtype, out_dtype)
    def gate(thread, num_threads, x, shift, scale, base, slope, out):
        num_rows, any_dim = x.shape
        dim = any_dim if fixed == 0 else fixed
        for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
            for column in range(0, dim, width):
                value = load(x, row * dim + column)
                inner = get(shift, column) + get(scale, column) * value
                gate = each(np.float32(1)) / (each(np.float32(1)) + exp(each(np.float32(0)) - inner))
                store(out, row * dim + column, value * (get(base, column) + get(slope, column) * gate))

    return gate


@cache
def _backward_kernel(fixed: int) -> Any:
    ops = arithmetic(fixed, torch.float32)
    get, put, each, width = ops.get, ops.put, ops.each, ops.width
    exp = exponential(fixed)

    @jit_for(fixed, BLOCK_ROWS)
    def ungate(thread, num_threads, grad, x, shift, scale, base, slope, x_grad, sums):
        num_rows, any_dim = x.shape
        dim = any_dim if fixed == 0 else fixed
        num_blocks = sums.shape[0]
        one = each(np.float32(1))
        for block in range(num_blocks * thread // num_threads, num_blocks * (thread + 1) // num_threads):
            for column in range(0, dim, width):
                own_shift, own_scale, own_base, own_slope = get(shift, column), get(scale, column), get(base, column), get(slope, column)
                inner_sum = inner_x_sum = value_sum = gate_sum = each(np.float32(0))
                for row in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows)):
                    i = row * dim + column
                    value, upstream = get(x, i), get(grad, i)
                    gate = one / (one + exp(each(np.float32(0)) - (own_shift + own_scale * value)))
                    of_gate = upstream * value
                    of_inner = of_gate * own_slope * gate * (one - gate)
                    put(x_grad, i, upstream * (own_base + own_slope * gate) + of_inner * own_scale)
                    inner_sum = inner_sum + of_inner
                    inner_x_sum = inner_x_sum + of_inner * value
                    value_sum = value_sum + of_gate
                    gate_sum = gate_sum + of_gate * gate
                first = 4 * dim * block + column
                put(sums, first, inner_sum)
                put(sums, first + dim, inner_x_sum)
                put(sums, first + 2 * dim, value_sum)
                put(sums, first + 3 * dim, gate_sum)

    return ungate
