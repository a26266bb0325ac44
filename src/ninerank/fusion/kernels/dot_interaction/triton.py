"""Triton kernels: one row's fields are a tile; the pairs of one field with those before it lie one after another in the output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.dot_interaction import backward_reference, num_pairs, reference
from ninerank.fusion.kernels.launch import TILE_ELEMENTS, Tile, is_wide, num_programs, on_device

__all__ = ["backward", "dot_grad_kernel", "dot_kernel", "run"]


@triton.jit
def load_fields(fields, row, field_F, column_D, num_fields, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """A row's fields as a tile, zero beyond the last."""
    address_FD = fields + (row * num_fields + field_F[:, None]) * DIM + column_D[None, :]
    if DIM == COLUMNS:
        return tl.load(address_FD, mask=(field_F < num_fields)[:, None], other=0.0)
    return tl.load(address_FD, mask=(field_F < num_fields)[:, None] & (column_D < DIM)[None, :], other=0.0)


@triton.jit
def dot_kernel(fields, out, num_rows, num_fields, DIM: tl.constexpr, FIELDS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """out[b, pairs of f] = fields[b, before f] times fields[b, f]."""
    column_D = tl.arange(0, COLUMNS)
    field_F = tl.arange(0, FIELDS)
    num_out = num_fields * (num_fields - 1) // 2
    for place in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = place + tl.full((), 0, tl.int64) if WIDE else place
        tile_FD = load_fields(fields, row, field_F, column_D, num_fields, DIM, COLUMNS)
        for field in range(1, num_fields):
            own_D = tl.load(fields + (row * num_fields + field) * DIM + column_D, mask=column_D < DIM, other=0.0)
            dot_F = tl.sum(tile_FD * own_D[None, :], axis=1)
            tl.store(out + row * num_out + field * (field - 1) // 2 + field_F, dot_F, mask=field_F < field)


@triton.jit
def dot_grad_kernel(
    grad, fields, fields_grad, num_rows, num_fields, DIM: tl.constexpr, FIELDS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """fields_grad[b, f] = sum over g of grad of the pair times fields[b, g]."""
    column_D = tl.arange(0, COLUMNS)
    field_F = tl.arange(0, FIELDS)
    num_out = num_fields * (num_fields - 1) // 2
    for place in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = place + tl.full((), 0, tl.int64) if WIDE else place
        tile_FD = load_fields(fields, row, field_F, column_D, num_fields, DIM, COLUMNS)
        total_FD = tl.zeros((FIELDS, COLUMNS), dtype=tl.float32)
        for field in range(1, num_fields):
            own_D = tl.load(fields + (row * num_fields + field) * DIM + column_D, mask=column_D < DIM, other=0.0)
            grad_F = tl.load(grad + row * num_out + field * (field - 1) // 2 + field_F, mask=field_F < field, other=0.0)
            sum_D = tl.sum(grad_F[:, None] * tile_FD, axis=0)
            is_own_F = tl.where(field_F == field, 1.0, 0.0)
            total_FD += grad_F[:, None] * own_D[None, :] + is_own_F[:, None] * sum_D[None, :]
        address_FD = fields_grad + (row * num_fields + field_F[:, None]) * DIM + column_D[None, :]
        if DIM == COLUMNS:
            tl.store(address_FD, total_FD, mask=(field_F < num_fields)[:, None])
        else:
            tl.store(address_FD, total_FD, mask=(field_F < num_fields)[:, None] & (column_D < DIM)[None, :])


def run(fields_BFD: Tensor) -> Tensor:
    if not _fits(fields_BFD):
        return reference(fields_BFD)
    num_rows, num_fields, _ = fields_BFD.shape
    out_BP = torch.zeros(num_rows, num_pairs(num_fields), device=fields_BFD.device)
    if out_BP.numel() and fields_BFD.numel():
        with on_device(fields_BFD.device):
            dot_kernel[(_programs(fields_BFD),)](fields_BFD, out_BP, num_rows, num_fields, **_shape(fields_BFD))
    return out_BP


def backward(grad_BP: Tensor, fields_BFD: Tensor) -> Tensor:
    if not _fits(fields_BFD):
        return backward_reference(grad_BP, fields_BFD)
    num_rows, num_fields, _ = fields_BFD.shape
    grad_BFD = torch.zeros_like(fields_BFD)
    if grad_BP.numel() and fields_BFD.numel():
        with on_device(fields_BFD.device):
            dot_grad_kernel[(_programs(fields_BFD),)](grad_BP, fields_BFD, grad_BFD, num_rows, num_fields, **_shape(fields_BFD))
    return grad_BFD


def _programs(fields_BFD: Tensor) -> int:
    return num_programs(fields_BFD.shape[0], Tile(1, fields_BFD.shape[2]), fields_BFD.device)


def _fits(fields_BFD: Tensor) -> bool:
    """Whether a row's fields are one tile; batched matrix products of the device are better for more than that."""
    return max(1, fields_BFD.shape[1]) * max(1, fields_BFD.shape[2]) <= TILE_ELEMENTS


def _shape(fields_BFD: Tensor) -> dict[str, int]:
    num_rows, num_fields, dim = fields_BFD.shape
    tile = Tile.of(dim, fields_BFD.device.type)
    fields = 1 << (num_fields - 1).bit_length()
    return {"DIM": dim, "FIELDS": fields, "COLUMNS": tile.columns, "WIDE": is_wide(num_rows * max(num_fields, 1), max(dim, num_fields))}
