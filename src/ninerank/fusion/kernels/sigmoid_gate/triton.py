"""Triton kernel: tiles of rows by columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.launch import Tile, num_programs, on_device

__all__ = ["gate_kernel", "run"]


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
