"""Numba kernel: threads share the rows out; several columns at once, the exponential as a polynomial in registers."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit_for
from ninerank.fusion.kernels.lanes import arithmetic, exponential

__all__ = ["run"]


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
