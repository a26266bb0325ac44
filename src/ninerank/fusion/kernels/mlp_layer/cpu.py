"""oneDNN's product with bias and activation (`products`); Numba for what is left around it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import products, threads
from ninerank.fusion.kernels.jit import as_numpy, jit_for
from ninerank.fusion.kernels.lanes import arithmetic

__all__ = ["backward", "combine"]

BLOCK_ROWS = 128


def combine(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: str, mask_BO: Tensor | None) -> tuple[Tensor, Tensor | None]:
    a_BO = products.linear(x_BI, weight_OI, bias_O, activation)
    return a_BO, None if mask_BO is None else a_BO * mask_BO


def backward(grad_BO: Tensor, a_BO: Tensor, activation: str, mask_BO: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows, width = grad_BO.shape
    of_z_BO = torch.empty_like(grad_BO)
    of_mask_BO = of_z_BO if mask_BO is None else torch.empty_like(grad_BO)
    sums_PO = torch.zeros(-(-num_rows // BLOCK_ROWS), width)
    arrays = [
        as_numpy(value) for value in (grad_BO, a_BO.contiguous(), grad_BO if mask_BO is None else mask_BO, of_z_BO, of_mask_BO, sums_PO)
    ]
    lanes = next((lane for lane in (8, 4) if width % lane == 0), 0)
    kernel = _backward_kernel(lanes, activation == "relu", mask_BO is not None)
    threads.run(kernel, threads.num_threads_for(3 * grad_BO.numel()), *arrays)
    return of_z_BO, sums_PO.sum(0), None if mask_BO is None else of_mask_BO


@cache
def _backward_kernel(lanes: int, cuts: bool, masks: bool) -> Any:
    ops = arithmetic(lanes, torch.float32)
    get, put, where_positive, width = ops.get, ops.put, ops.where_positive, ops.width

    @jit_for(lanes, cuts, masks, BLOCK_ROWS)
    def unlayer(thread, num_threads, grad, a, mask, of_z, of_mask, sums):
        num_rows, columns = grad.shape
        num_blocks = sums.shape[0]
        for block in range(num_blocks * thread // num_threads, num_blocks * (thread + 1) // num_threads):
            for row in range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows)):
                for column in range(0, columns, width):
                    i, own = row * columns + column, block * columns + column
                    upstream = get(grad, i)
                    if masks:
                        put(of_mask, i, upstream * get(a, i))
                        upstream = upstream * get(mask, i)
                    if cuts:
                        upstream = where_positive(upstream, get(a, i))
                    put(of_z, i, upstream)
                    put(sums, own, get(sums, own) + upstream)

    return unlayer
