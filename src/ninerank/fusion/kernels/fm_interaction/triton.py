"""Triton kernels: tiles of rows by columns, a loop over the fields."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import load_rows, store_rows
from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["backward", "fm_grad_kernel", "fm_kernel", "run"]


@triton.jit
def fm_kernel(fields, out, num_rows, num_fields, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """out[b] = half of the square of the sum less the sum of the squares, summed over the columns."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        is_there_B = row_B < num_rows
        total_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        squares_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        for field in range(num_fields):
            value_BD = load_rows(fields, row_B * num_fields + field, is_there_B, column_D, DIM, COLUMNS, WIDE)
            total_BD += value_BD
            squares_BD += value_BD * value_BD
        tl.store(out + row_B, 0.5 * tl.sum(total_BD * total_BD - squares_BD, axis=1), mask=is_there_B)


@triton.jit
def fm_grad_kernel(
    grad, fields, fields_grad, num_rows, num_fields, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """fields_grad[b, f] = grad[b] * (sum of the fields - fields[b, f])."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        is_there_B = row_B < num_rows
        grad_B = tl.load(grad + row_B, mask=is_there_B, other=0.0)
        total_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        for field in range(num_fields):
            total_BD += load_rows(fields, row_B * num_fields + field, is_there_B, column_D, DIM, COLUMNS, WIDE)
        for field in range(num_fields):
            value_BD = load_rows(fields, row_B * num_fields + field, is_there_B, column_D, DIM, COLUMNS, WIDE)
            own_BD = grad_B[:, None] * (total_BD - value_BD)
            store_rows(fields_grad, row_B * num_fields + field, is_there_B, column_D, own_BD, DIM, COLUMNS, WIDE)


def run(fields_BFD: Tensor) -> Tensor:
    num_rows, num_fields, dim = fields_BFD.shape
    out_B1 = torch.zeros(num_rows, 1, device=fields_BFD.device)
    if fields_BFD.numel():
        tile = Tile.of(dim, fields_BFD.device.type)
        with on_device(fields_BFD.device):
            fm_kernel[(num_programs(num_rows, tile, fields_BFD.device),)](
                *(fields_BFD, out_B1, num_rows, num_fields), **_shape(tile, dim, num_rows * num_fields)
            )
    return out_B1


def backward(grad_B1: Tensor, fields_BFD: Tensor) -> Tensor:
    num_rows, num_fields, dim = fields_BFD.shape
    grad_BFD = torch.empty_like(fields_BFD)
    if grad_BFD.numel():
        tile = Tile.of(dim, fields_BFD.device.type)
        with on_device(fields_BFD.device):
            fm_grad_kernel[(num_programs(num_rows, tile, fields_BFD.device),)](
                *(grad_B1, fields_BFD, grad_BFD, num_rows, num_fields), **_shape(tile, dim, num_rows * num_fields)
            )
    return grad_BFD


def _shape(tile: Tile, dim: int, num_rows: int) -> dict[str, int]:
    return {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns, "WIDE": is_wide(num_rows, dim)}
