"""Triton kernels around the device's own product: tiles of rows by columns, each number read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["COLUMNS", "ROWS", "backward", "combine", "layer_grad_kernel", "layer_kernel"]

ROWS, COLUMNS = 16, 128


@triton.jit
def layer_kernel(
    z,
    bias,
    mask,
    out,
    num_rows,
    width,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """z becomes a = act(z + bias); with MASKED out = a * mask."""
    across = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        row_B = tile // across * ROWS + tl.arange(0, ROWS)
        column_C = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        is_there_BC = (row_B < num_rows)[:, None] & (column_C < width)[None, :]
        if WIDE:
            row_B = row_B.to(tl.int64)
        place_BC = row_B[:, None] * width + column_C[None, :]
        bias_C = tl.load(bias + column_C, mask=column_C < width, other=0.0)
        a_BC = tl.load(z + place_BC, mask=is_there_BC, other=0.0) + bias_C[None, :]
        if RELU:
            a_BC = tl.maximum(a_BC, 0.0)
        tl.store(z + place_BC, a_BC, mask=is_there_BC)
        if MASKED:
            tl.store(out + place_BC, a_BC * tl.load(mask + place_BC, mask=is_there_BC, other=0.0), mask=is_there_BC)


@triton.jit
def layer_grad_kernel(
    grad,
    a,
    mask,
    of_z,
    of_mask,
    num_rows,
    width,
    RELU: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """of_z = grad * mask where a is above 0, or everywhere; of_mask = grad * a."""
    across = tl.cdiv(width, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS) * across, tl.num_programs(0)):
        row_B = tile // across * ROWS + tl.arange(0, ROWS)
        column_C = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        is_there_BC = (row_B < num_rows)[:, None] & (column_C < width)[None, :]
        if WIDE:
            row_B = row_B.to(tl.int64)
        place_BC = row_B[:, None] * width + column_C[None, :]
        of_z_BC = tl.load(grad + place_BC, mask=is_there_BC, other=0.0)
        a_BC = tl.load(a + place_BC, mask=is_there_BC, other=0.0)
        if MASKED:
            tl.store(of_mask + place_BC, of_z_BC * a_BC, mask=is_there_BC)
            of_z_BC = of_z_BC * tl.load(mask + place_BC, mask=is_there_BC, other=0.0)
        if RELU:
            of_z_BC = tl.where(a_BC > 0.0, of_z_BC, 0.0)
        tl.store(of_z + place_BC, of_z_BC, mask=is_there_BC)


def combine(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, activation: str, mask_BO: Tensor | None) -> tuple[Tensor, Tensor | None]:
    a_BO = torch.mm(x_BI, weight_OI.t())
    out_BO = None if mask_BO is None else torch.empty_like(a_BO)
    if a_BO.numel():
        # Without a mask its places are never touched, and any tensor does.
        rest = (a_BO, a_BO) if mask_BO is None or out_BO is None else (mask_BO, out_BO)
        with on_device(a_BO.device):
            layer_kernel[(_programs(a_BO),)](a_BO, bias_O.contiguous(), *rest, *a_BO.shape, **_shape(a_BO, activation, mask_BO))
    return a_BO, out_BO


def backward(grad_BO: Tensor, a_BO: Tensor, activation: str, mask_BO: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    of_z_BO = torch.empty_like(grad_BO)
    of_mask_BO = None if mask_BO is None else torch.empty_like(grad_BO)
    if grad_BO.numel():
        mask, of_mask = (a_BO, of_z_BO) if mask_BO is None or of_mask_BO is None else (mask_BO, of_mask_BO)
        with on_device(grad_BO.device):
            layer_grad_kernel[(_programs(grad_BO),)](
                *(grad_BO, a_BO.contiguous(), mask, of_z_BO, of_mask, *grad_BO.shape), **_shape(grad_BO, activation, mask_BO)
            )
    return of_z_BO, of_z_BO.sum(0), of_mask_BO


def _programs(value_BO: Tensor) -> int:
    num_rows, width = value_BO.shape
    return num_programs(-(-num_rows // ROWS) * -(-width // COLUMNS), Tile(1, COLUMNS), value_BO.device)


def _shape(value_BO: Tensor, activation: str, mask_BO: Tensor | None) -> dict[str, object]:
    is_masked = mask_BO is not None
    return {"RELU": activation == "relu", "MASKED": is_masked, "ROWS": ROWS, "COLUMNS": COLUMNS, "WIDE": is_wide(*value_BO.shape)}
