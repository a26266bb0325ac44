"""Triton kernel: tiles of output rows, gathered loads of whole rows of codes.

Scale and bias, which are one number a row each, are gathered by torch, so that the kernel reads them contiguously.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import is_row
from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device
from ninerank.fusion.kernels.quantized_rows import HEADER_BYTES, code_bytes

__all__ = ["quantized_kernel", "run"]


@triton.jit
def quantized_kernel(
    codes,
    rows,
    scale,
    bias,
    out,
    num_outputs,
    num_rows,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    STRIDE: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[o] = bias[o] + scale[o] * codes of row rows[o]; zero for a row that is not there. PIECE: bytes of codes in a row."""
    column_P = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_outputs, BLOCK), tl.num_programs(0)):
        output_B = block * BLOCK + tl.arange(0, BLOCK)
        is_output_B = output_B < num_outputs
        row_B = tl.load(rows + output_B, mask=is_output_B, other=-1)
        is_valid_B = is_row(row_B, num_rows)
        row_B = tl.where(is_valid_B, row_B, 0)
        scale_B = tl.load(scale + output_B, mask=is_output_B, other=0.0)
        bias_B = tl.load(bias + output_B, mask=is_output_B, other=0.0)
        if WIDE:
            row_B = row_B.to(tl.int64)
            output_B = output_B.to(tl.int64)
        address_BP = codes + row_B[:, None] * STRIDE + column_P[None, :]
        target_BP = out + output_B[:, None] * DIM + column_P[None, :]
        if PIECE == COLUMNS:
            code_BP = tl.load(address_BP, mask=is_valid_B[:, None], other=0).to(tl.int32)
        else:
            code_BP = tl.load(address_BP, mask=is_valid_B[:, None] & (column_P < PIECE)[None, :], other=0).to(tl.int32)
        first_BP = code_BP & 15 if HALVES else code_BP
        value_BP = bias_B[:, None] + scale_B[:, None] * first_BP.to(tl.float32)
        if PIECE == COLUMNS:
            tl.store(target_BP, value_BP, mask=is_output_B[:, None])
        else:
            tl.store(target_BP, value_BP, mask=is_output_B[:, None] & (column_P < PIECE)[None, :])
        if HALVES:
            value_BP = bias_B[:, None] + scale_B[:, None] * (code_BP >> 4).to(tl.float32)
            if DIM - PIECE == COLUMNS:
                tl.store(target_BP + PIECE, value_BP, mask=is_output_B[:, None])
            else:
                tl.store(target_BP + PIECE, value_BP, mask=is_output_B[:, None] & (column_P < DIM - PIECE)[None, :])


def run(storage_VS: Tensor, rows_N: Tensor, dim: int, bits: int) -> Tensor:
    num_rows, stride = storage_VS.shape
    device, piece = storage_VS.device, code_bytes(dim, bits)
    if num_rows == 0 or rows_N.numel() == 0:
        return torch.zeros(rows_N.numel(), dim, device=device)
    out_ND = torch.empty(rows_N.numel(), dim, device=device)
    tile = Tile.of(piece, device.type, gathered_bytes=1)
    rows_N = rows_N.contiguous()
    is_there_N = (rows_N >= 0) & (rows_N < num_rows)
    header_N2 = storage_VS.view(torch.float32)[torch.where(is_there_N, rows_N, 0).to(torch.int64), :2]
    scale_N, bias_N = (torch.where(is_there_N, column_N, 0.0).contiguous() for column_N in header_N2.unbind(1))
    with on_device(device):
        quantized_kernel[(num_programs(rows_N.numel(), tile, device),)](
            *(storage_VS.view(-1)[HEADER_BYTES:], rows_N, scale_N, bias_N, out_ND, rows_N.numel(), num_rows),
            DIM=dim,
            PIECE=piece,
            STRIDE=stride,
            HALVES=bits == 4,
            BLOCK=tile.rows,
            COLUMNS=tile.columns,
            WIDE=is_wide(max(num_rows, rows_N.numel()), max(stride, dim)),
        )
    return out_ND
