"""Triton kernels: tiles of positions for what is one a position, tiles of histories for the sums over them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import holds, is_row, load_rows, store_rows
from ninerank.fusion.kernels.jagged import history_of
from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["backward", "key_grad_kernel", "pair_kernel", "query_grad_kernel", "run"]


@triton.jit
def pair_kernel(
    query,
    key,
    histories,
    out,
    num_positions,
    num_histories,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[n] = [query[b], key[n], query[b] * key[n]] with b = histories[n]."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_positions, BLOCK), tl.num_programs(0)):
        position_B = block * BLOCK + tl.arange(0, BLOCK)
        is_there_B = position_B < num_positions
        history_B = tl.load(histories + position_B, mask=is_there_B, other=-1)
        has_query_B = is_row(history_B, num_histories)
        query_BD = load_rows(query, tl.where(has_query_B, history_B, 0), has_query_B, column_D, DIM, COLUMNS, WIDE)
        key_BD = load_rows(key, position_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
        store_rows(out, 3 * position_B, is_there_B, column_D, query_BD, DIM, COLUMNS, WIDE)
        store_rows(out, 3 * position_B + 1, is_there_B, column_D, key_BD, DIM, COLUMNS, WIDE)
        store_rows(out, 3 * position_B + 2, is_there_B, column_D, query_BD * key_BD, DIM, COLUMNS, WIDE)


@triton.jit
def key_grad_kernel(
    grad,
    query,
    histories,
    key_grad,
    num_positions,
    num_histories,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """key_grad[n] = grad of the key + query[b] * grad of the product."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_positions, BLOCK), tl.num_programs(0)):
        position_B = block * BLOCK + tl.arange(0, BLOCK)
        is_there_B = position_B < num_positions
        history_B = tl.load(histories + position_B, mask=is_there_B, other=-1)
        has_query_B = is_row(history_B, num_histories)
        query_BD = load_rows(query, tl.where(has_query_B, history_B, 0), has_query_B, column_D, DIM, COLUMNS, WIDE)
        of_key_BD = load_rows(grad, 3 * position_B + 1, is_there_B, column_D, DIM, COLUMNS, WIDE)
        of_product_BD = load_rows(grad, 3 * position_B + 2, is_there_B, column_D, DIM, COLUMNS, WIDE)
        store_rows(key_grad, position_B, is_there_B, column_D, of_key_BD + query_BD * of_product_BD, DIM, COLUMNS, WIDE)


@triton.jit
def query_grad_kernel(
    grad,
    key,
    starts,
    lengths,
    query_grad,
    num_histories,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """query_grad[b] = sum over its history of grad of the query + key[n] * grad of the product."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_histories, BLOCK), tl.num_programs(0)):
        history_B = block * BLOCK + tl.arange(0, BLOCK)
        is_history_B = history_B < num_histories
        start_B = tl.load(starts + history_B, mask=is_history_B, other=0)
        length_B = tl.load(lengths + history_B, mask=is_history_B, other=0)
        total_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        for i in range(tl.max(length_B, axis=0)):
            is_there_B = holds(length_B, i)
            position_B = tl.where(is_there_B, start_B + i, 0)
            key_BD = load_rows(key, position_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
            total_BD += load_rows(grad, 3 * position_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
            total_BD += key_BD * load_rows(grad, 3 * position_B + 2, is_there_B, column_D, DIM, COLUMNS, WIDE)
        store_rows(query_grad, history_B, is_history_B, column_D, total_BD, DIM, COLUMNS, WIDE)


def run(query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> Tensor:
    num_positions, dim = key_ND.shape
    out = torch.empty(num_positions, 3 * dim, device=key_ND.device)
    if out.numel():
        tile = Tile.of(dim, key_ND.device.type, gathered_bytes=4)
        histories = history_of(offsets, num_positions).to(torch.int32)
        with on_device(key_ND.device):
            pair_kernel[(num_programs(num_positions, tile, key_ND.device),)](
                *(query_BD, key_ND, histories, out, num_positions, query_BD.shape[0]), **_shape(tile, dim, num_positions)
            )
    return out


def backward(grad: Tensor, query_BD: Tensor, key_ND: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    num_positions, dim = key_ND.shape
    num_histories, device = query_BD.shape[0], key_ND.device
    query_grad_BD, key_grad_ND = torch.zeros_like(query_BD), torch.empty_like(key_ND)
    if key_grad_ND.numel():
        tile = Tile.of(dim, device.type, gathered_bytes=4)
        shape = _shape(tile, dim, num_positions)
        histories = history_of(offsets, num_positions).to(torch.int32)
        starts, lengths = offsets[:-1].to(torch.int32), offsets.diff().to(torch.int32)
        with on_device(device):
            key_grad_kernel[(num_programs(num_positions, tile, device),)](
                grad, query_BD, histories, key_grad_ND, num_positions, num_histories, **shape
            )
            query_grad_kernel[(num_programs(num_histories, tile, device),)](
                grad, key_ND, starts, lengths, query_grad_BD, num_histories, **shape
            )
    return query_grad_BD, key_grad_ND


def _shape(tile: Tile, dim: int, num_positions: int) -> dict[str, int]:
    return {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns, "WIDE": is_wide(3 * num_positions, dim)}
