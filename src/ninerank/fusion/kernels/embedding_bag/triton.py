"""Triton kernels of pooled and plain lookup: tiles of output rows, contiguous stores, gathered loads of whole rows.

Indices arrive in the order of the output, so that nothing is divided and nothing is stored out of order. The same
kernels sum gradients by segment (`embedding_reduce`), where the "table" is the gradient.

For Ascend: integers are compared by the sign of a difference in float32 (its vector cores compare integers one by one, and rounding keeps
a sign); a row that is not there is replaced by row 0 before its address is taken (there, a masked load of scattered rows reads first and
chooses later); addresses are summed in int32 where that holds them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["gather_rows", "pool_segments", "run"]


@triton.jit
def is_row(row_B, num_rows):
    """Whether 0 <= row < num_rows."""
    return (row_B.to(tl.float32) >= 0.0) & ((num_rows - 1 - row_B).to(tl.float32) >= 0.0)


@triton.jit
def holds(length_B, i):
    """Whether a segment of that length has an entry i, counted from 0."""
    return (length_B - i).to(tl.float32) > 0.0


@triton.jit
def load_rows(table, row_B, is_there_B, column_D, DIM: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a table as a float32 tile, zero where not there: scattered rows name a row of the table even then."""
    if WIDE:
        row_B = row_B.to(tl.int64)
    address_BD = table + row_B[:, None] * DIM + column_D[None, :]
    if DIM == COLUMNS:
        return tl.load(address_BD, mask=is_there_B[:, None], other=0.0).to(tl.float32)
    return tl.load(address_BD, mask=is_there_B[:, None] & (column_D < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_rows(table, row_B, is_there_B, column_D, tile_BD, DIM: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Write a tile to rows of a table, where there."""
    if WIDE:
        row_B = row_B.to(tl.int64)
    address_BD = table + row_B[:, None] * DIM + column_D[None, :]
    tile_BD = tile_BD.to(table.dtype.element_ty)
    if DIM == COLUMNS:
        tl.store(address_BD, tile_BD, mask=is_there_B[:, None])
    else:
        tl.store(address_BD, tile_BD, mask=is_there_B[:, None] & (column_D < DIM)[None, :])


@triton.jit
def sum_segment(
    table,
    rows,
    scale,
    start_B,
    length_B,
    num_rows,
    column_D,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Tile of sums: entry i of a segment adds scale[i] * table[rows[i]]."""
    total_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
    for i in range(tl.max(length_B, axis=0)):
        is_there_B = holds(length_B, i)
        place_B = tl.where(is_there_B, start_B + i, 0)
        row_B = tl.load(rows + place_B, mask=is_there_B, other=-1)
        is_valid_B = is_row(row_B, num_rows)
        value_BD = load_rows(table, tl.where(is_valid_B, row_B, 0), is_valid_B, column_D, DIM, COLUMNS, WIDE)
        if HAS_SCALE:
            value_BD = value_BD * tl.load(scale + place_B, mask=is_there_B, other=0.0)[:, None]
        total_BD += value_BD
    return total_BD


@triton.jit
def gather_kernel(
    table, rows, out, num_outputs, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """out[o] = table[rows[o]]; zero for a row that is not there."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_outputs, BLOCK), tl.num_programs(0)):
        output_B = block * BLOCK + tl.arange(0, BLOCK)
        is_output_B = output_B < num_outputs
        row_B = tl.load(rows + output_B, mask=is_output_B, other=-1)
        is_valid_B = is_row(row_B, num_rows)
        tile_BD = load_rows(table, tl.where(is_valid_B, row_B, 0), is_valid_B, column_D, DIM, COLUMNS, WIDE)
        store_rows(out, output_B, is_output_B, column_D, tile_BD, DIM, COLUMNS, WIDE)


@triton.jit
def pool_kernel(
    table,
    rows,
    scale,
    starts,
    lengths,
    share,
    out,
    num_outputs,
    num_rows,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[o] = share[o] * sum of the segment that starts at starts[o]."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_outputs, BLOCK), tl.num_programs(0)):
        output_B = block * BLOCK + tl.arange(0, BLOCK)
        is_output_B = output_B < num_outputs
        start_B = tl.load(starts + output_B, mask=is_output_B, other=0)
        length_B = tl.load(lengths + output_B, mask=is_output_B, other=0)
        total_BD = sum_segment(table, rows, scale, start_B, length_B, num_rows, column_D, DIM, BLOCK, COLUMNS, HAS_SCALE, WIDE)
        if HAS_SHARE:
            total_BD = total_BD * tl.load(share + output_B, mask=is_output_B, other=0.0)[:, None]
        store_rows(out, output_B, is_output_B, column_D, total_BD, DIM, COLUMNS, WIDE)


def run(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
) -> Tensor:
    dim = weight_RD.shape[1]
    num_bags = (rows_N.shape[0] if offsets is None else offsets.shape[0] - 1) // num_features

    def in_order(per_bag: Tensor) -> Tensor:
        """(F * B,) values of bags in the order of the output."""
        return per_bag.contiguous() if feature_major else per_bag.view(num_features, num_bags).t().reshape(-1)

    if offsets is None and sample_weight_N is None:
        out = gather_rows(weight_RD, in_order(rows_N))
    else:
        bounds = torch.arange(rows_N.numel() + 1, device=rows_N.device) if offsets is None else offsets
        lengths = bounds.diff()
        share = None
        if mean_F is not None:
            inverse = lengths.clamp(min=1).to(torch.float32).reciprocal().view(num_features, num_bags)
            share = in_order(torch.where(mean_F[:, None], inverse, 1.0).reshape(-1))
        out = pool_segments(weight_RD, rows_N.contiguous(), sample_weight_N, in_order(bounds[:-1]), in_order(lengths), share)
    return out.view((num_features, num_bags, dim) if feature_major else (num_bags, num_features, dim))


def gather_rows(table_RD: Tensor, rows_O: Tensor) -> Tensor:
    """float32 (O, D): each output's row, zero where there is none."""
    num_rows, dim = table_RD.shape
    if num_rows == 0:
        return torch.zeros(rows_O.numel(), dim, device=table_RD.device)
    out_OD = torch.empty(rows_O.numel(), dim, dtype=torch.float32, device=table_RD.device)
    tile, wide = Tile.of(dim, table_RD.device.type, gathered_bytes=table_RD.element_size()), is_wide(max(num_rows, rows_O.numel()), dim)
    if out_OD.numel():
        with on_device(table_RD.device):
            gather_kernel[(num_programs(rows_O.numel(), tile, table_RD.device),)](
                table_RD, rows_O, out_OD, rows_O.numel(), num_rows, DIM=dim, BLOCK=tile.rows, COLUMNS=tile.columns, WIDE=wide
            )
    return out_OD


def pool_segments(
    table_RD: Tensor, rows_N: Tensor, scale_N: Tensor | None, starts_O: Tensor, lengths_O: Tensor, share_O: Tensor | None
) -> Tensor:
    """float32 (O, D): each output's segment of rows, scaled and summed in order."""
    num_rows, dim = table_RD.shape
    num_outputs = starts_O.numel()
    if num_rows == 0 or rows_N.numel() == 0:
        return torch.zeros(num_outputs, dim, device=table_RD.device)
    out_OD = torch.empty(num_outputs, dim, dtype=torch.float32, device=table_RD.device)
    tile, wide = Tile.of(dim, table_RD.device.type, gathered_bytes=table_RD.element_size()), is_wide(max(num_rows, num_outputs), dim)
    if out_OD.numel():
        with on_device(table_RD.device):
            pool_kernel[(num_programs(num_outputs, tile, table_RD.device),)](
                *(table_RD, rows_N, rows_N if scale_N is None else scale_N.to(torch.float32).contiguous()),
                *(starts_O.to(torch.int32), lengths_O.to(torch.int32), rows_N if share_O is None else share_O),
                *(out_OD, num_outputs, num_rows),
                DIM=dim,
                BLOCK=tile.rows,
                COLUMNS=tile.columns,
                HAS_SCALE=scale_N is not None,
                HAS_SHARE=share_O is not None,
                WIDE=wide,
            )
    return out_OD
