"""Triton kernel: tiles of rows by columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.launch import Tile, num_programs, on_device

__all__ = ["backward", "gate_grad_kernel", "gate_kernel", "run"]


@triton.jit
def gate_kernel(x, shift, scale, base, slope, out, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """out = x * (base + slope * sigmoid(shift + scale * x)), row by row."""
    column_D = tl.arange(0, COLUMNS)
    is_column_D = column_D < DIM
    shift_D = tl.load(shift + column_D, mask=is_column_D, other=0.0)
    scale_D = tl.load(scale + column_D, mask=is_column_D, other=0.0)
    base_D = tl.load(base + column_D, mask=is_column_D, other=0.0)
    slope_D = tl.load(slope + column_D, mask=is_column_D, other=0.0)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        place_BD = row_B[:, None] * DIM + column_D[None, :]
        is_there_BD = (row_B < num_rows)[:, None] & is_column_D[None, :]
        value_BD = tl.load(x + place_BD, mask=is_there_BD, other=0.0).to(tl.float32)
        gate_BD = 1.0 / (1.0 + tl.exp(-(shift_D[None, :] + scale_D[None, :] * value_BD)))
        result_BD = value_BD * (base_D[None, :] + slope_D[None, :] * gate_BD)
        tl.store(out + place_BD, result_BD.to(out.dtype.element_ty), mask=is_there_BD)


@triton.jit
def gate_grad_kernel(
    grad, x, shift, scale, base, slope, x_grad, sums, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    """x_grad, and each program's sums of the gradients of shift, scale, base and slope."""
    column_D = tl.arange(0, COLUMNS)
    is_column_D = column_D < DIM
    shift_D = tl.load(shift + column_D, mask=is_column_D, other=0.0)
    scale_D = tl.load(scale + column_D, mask=is_column_D, other=0.0)
    base_D = tl.load(base + column_D, mask=is_column_D, other=0.0)
    slope_D = tl.load(slope + column_D, mask=is_column_D, other=0.0)
    inner_sum_D = tl.zeros((COLUMNS,), dtype=tl.float32)
    inner_x_sum_D = tl.zeros((COLUMNS,), dtype=tl.float32)
    value_sum_D = tl.zeros((COLUMNS,), dtype=tl.float32)
    gate_sum_D = tl.zeros((COLUMNS,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        place_BD = row_B[:, None] * DIM + column_D[None, :]
        is_there_BD = (row_B < num_rows)[:, None] & is_column_D[None, :]
        value_BD = tl.load(x + place_BD, mask=is_there_BD, other=0.0)
        grad_BD = tl.load(grad + place_BD, mask=is_there_BD, other=0.0)
        gate_BD = 1.0 / (1.0 + tl.exp(-(shift_D[None, :] + scale_D[None, :] * value_BD)))
        of_gate_BD = grad_BD * value_BD
        of_inner_BD = of_gate_BD * slope_D[None, :] * gate_BD * (1.0 - gate_BD)
        result_BD = grad_BD * (base_D[None, :] + slope_D[None, :] * gate_BD) + of_inner_BD * scale_D[None, :]
        tl.store(x_grad + place_BD, result_BD, mask=is_there_BD)
        inner_sum_D += tl.sum(of_inner_BD, axis=0)
        inner_x_sum_D += tl.sum(of_inner_BD * value_BD, axis=0)
        value_sum_D += tl.sum(of_gate_BD, axis=0)
        gate_sum_D += tl.sum(of_gate_BD * gate_BD, axis=0)
    target_D = sums + tl.program_id(0) * 4 * DIM + column_D
    tl.store(target_D, inner_sum_D, mask=is_column_D)
    tl.store(target_D + DIM, inner_x_sum_D, mask=is_column_D)
    tl.store(target_D + 2 * DIM, value_sum_D, mask=is_column_D)
    tl.store(target_D + 3 * DIM, gate_sum_D, mask=is_column_D)


def run(x: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor, bf16_out: bool) -> Tensor:
    dim = x.shape[-1]
    out = torch.empty_like(x, dtype=torch.bfloat16 if bf16_out else torch.float32)
    if x.numel():
        num_rows = x.numel() // dim
        tile = Tile.of(dim, x.device.type)
        with on_device(x.device):
            gate_kernel[(num_programs(num_rows, tile, x.device),)](
                *(x, shift_D, scale_D, base_D, slope_D, out, num_rows), DIM=dim, BLOCK=tile.rows, COLUMNS=tile.columns
            )
    return out


def backward(grad_ND: Tensor, x_ND: Tensor, shift_D: Tensor, scale_D: Tensor, base_D: Tensor, slope_D: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, dim = x_ND.shape
    x_grad_ND = torch.empty_like(x_ND)
    if x_ND.numel() == 0:
        return x_grad_ND, x_ND.new_zeros(4, dim)
    tile = Tile.of(dim, x_ND.device.type, many=True)
    programs = num_programs(num_rows, tile, x_ND.device)
    sums_P4D = torch.empty(programs, 4, dim, device=x_ND.device)
    with on_device(x_ND.device):
        gate_grad_kernel[(programs,)](
            *(grad_ND, x_ND, shift_D, scale_D, base_D, slope_D, x_grad_ND, sums_P4D, num_rows),
            DIM=dim,
            BLOCK=tile.rows,
            COLUMNS=tile.columns,
        )
    return x_grad_ND, sums_P4D.sum(0)
