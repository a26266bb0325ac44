"""Triton kernels: tiles of rows by columns, each number read and written once."""

import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["COLUMNS", "ROWS", "backward", "combine", "combine_kernel", "product_kernel"]

ROWS, COLUMNS = 16, 128


@triton.jit
def combine_kernel(x0, z, bias, x, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """out = x0 * (z + bias) + x."""
    across = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        row_B = tile // across * ROWS + tl.arange(0, ROWS)
        column_C = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        is_there_BC = (row_B < num_rows)[:, None] & (column_C < width)[None, :]
        if WIDE:
            row_B = row_B.to(tl.int64)
        place_BC = row_B[:, None] * width + column_C[None, :]
        bias_C = tl.load(bias + column_C, mask=column_C < width, other=0.0)
        factor_BC = tl.load(z + place_BC, mask=is_there_BC, other=0.0) + bias_C[None, :]
        first_BC = tl.load(x0 + place_BC, mask=is_there_BC, other=0.0)
        tl.store(out + place_BC, first_BC * factor_BC + tl.load(x + place_BC, mask=is_there_BC, other=0.0), mask=is_there_BC)


@triton.jit
def product_kernel(grad, x0, z, bias, x0_grad, z_grad, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """z_grad = grad * x0; x0_grad += grad * (z + bias)."""
    across = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        row_B = tile // across * ROWS + tl.arange(0, ROWS)
        column_C = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        is_there_BC = (row_B < num_rows)[:, None] & (column_C < width)[None, :]
        if WIDE:
            row_B = row_B.to(tl.int64)
        place_BC = row_B[:, None] * width + column_C[None, :]
        bias_C = tl.load(bias + column_C, mask=column_C < width, other=0.0)
        factor_BC = tl.load(z + place_BC, mask=is_there_BC, other=0.0) + bias_C[None, :]
        grad_BC = tl.load(grad + place_BC, mask=is_there_BC, other=0.0)
        total_BC = tl.load(x0_grad + place_BC, mask=is_there_BC, other=0.0) + grad_BC * factor_BC
        tl.store(z_grad + place_BC, grad_BC * tl.load(x0 + place_BC, mask=is_there_BC, other=0.0), mask=is_there_BC)
        tl.store(x0_grad + place_BC, total_BC, mask=is_there_BC)


def combine(x0_BI: Tensor, z_BI: Tensor, bias_I: Tensor, x_BI: Tensor, out_BI: Tensor) -> None:
    if out_BI.numel():
        with on_device(out_BI.device):
            combine_kernel[(_programs(out_BI),)](x0_BI, z_BI, bias_I, x_BI, out_BI, *out_BI.shape, **_shape(out_BI))


def backward(grad_BI: Tensor, x0_BI: Tensor, z_BI: Tensor, bias_I: Tensor, x0_grad_BI: Tensor, z_grad_BI: Tensor) -> Tensor:
    if grad_BI.numel():
        with on_device(grad_BI.device):
            product_kernel[(_programs(grad_BI),)](grad_BI, x0_BI, z_BI, bias_I, x0_grad_BI, z_grad_BI, *grad_BI.shape, **_shape(grad_BI))
    return z_grad_BI.sum(0)


def _programs(value_BI: Tensor) -> int:
    num_rows, width = value_BI.shape
    return num_programs(-(-num_rows // ROWS) * -(-width // COLUMNS), Tile(1, COLUMNS), value_BI.device)


def _shape(value_BI: Tensor) -> dict[str, int]:
    return {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDE": is_wide(*value_BI.shape)}
