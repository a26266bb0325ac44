"""Numba kernels: one pass over the rows, threads share blocks of them out."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, jit_for
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "combine"]

BLOCK_ROWS = 128


def combine(x0_BI: Tensor, z_BI: Tensor, bias_I: Tensor, x_BI: Tensor, out_BI: Tensor) -> None:
    arrays = [as_numpy(value) for value in (x0_BI, z_BI, bias_I, x_BI, out_BI)]
    threads.run(_combine_kernel(_lanes_of(bias_I)), threads.num_threads_for(2 * out_BI.numel()), *arrays)


def backward(grad_BI: Tensor, x0_BI: Tensor, z_BI: Tensor, bias_I: Tensor, x0_grad_BI: Tensor, z_grad_BI: Tensor) -> Tensor:
    sums_PI = torch.zeros(-(-len(grad_BI) // BLOCK_ROWS), len(bias_I))
    arrays = [as_numpy(value) for value in (grad_BI, x0_BI, z_BI, bias_I, x0_grad_BI, z_grad_BI, sums_PI)]
    threads.run(_backward_kernel(_lanes_of(bias_I)), threads.num_threads_for(3 * grad_BI.numel()), *arrays)
    return sums_PI.sum(0)


def _lanes_of(bias_I: Tensor) -> int:
    """8, 4 or 0: columns at once that a row can be cut into, as `arithmetic` takes it."""
    return next((width for width in (8, 4) if len(bias_I) % width == 0), 0)


@cache
def _combine_kernel(lanes: int) -> Any:
    ops = arithmetic(lanes, torch.float32)
    get, put, width = ops.get, ops.put, ops.width

    @jit_for(lanes)
    def cross(thread, num_threads, x0, z, bias, x, out):
        num_rows, columns = out.shape
        for row in range(num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads):
            for column in range(0, columns, width):
                i = row * columns + column
                put(out, i, get(x0, i) * (get(z, i) + get(bias, column)) + get(x, i))

    return cross


@cache
def _backward_kernel(lanes: int) -> Any:
    ops = arithmetic(lanes, torch.float32)
    get, put, width = ops.get, ops.put, ops.width

    @jit_for(lanes, BLOCK_ROWS)
    def uncross(thread, num_threads, grad, x0, z, bias, x0_grad, z_grad, sums):
        num_rows, columns = grad.shape
        num_blocks = sums.shape[0]
        for block in range(num_blocks * thread // num_threads, num_blocks * (thread + 1) // num_threads):
            for row in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows)):
                for column in range(0, columns, width):
                    i, own = row * columns + column, block * columns + column
                    upstream = get(grad, i)
                    of_z = upstream * get(x0, i)
                    put(z_grad, i, of_z)
                    put(x0_grad, i, get(x0_grad, i) + upstream * (get(z, i) + get(bias, column)))
                    put(sums, own, get(sums, own) + of_z)

    return uncross
