"""Triton kernels: tiles of queries, or of keys, that go through the distances one by one, so that every store is contiguous.

Rows are heads of positions. At one step all rows of a tile look as far back (keys: ahead), so that the distance's bias is one number,
taken out of a vector by weights of 0 and 1: its gradient goes the same way, and no element is stored by itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import holds, load_rows, store_rows
from ninerank.fusion.kernels.hstu_attention import places
from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["hstu_kernel", "backward", "hstu_tile", "hstu_key_grad_kernel", "hstu_query_grad_kernel", "run"]


def hstu_tile(key_dim: int, value_dim: int, device_type: str) -> tuple[int, int, int]:
    """Rows of a tile, columns of keys and of values."""
    keys, values = (Tile.of(dim, device_type) for dim in (key_dim, value_dim))
    return max(min(keys.rows, values.rows) // 2, 1), keys.columns, values.columns


@triton.jit
def at_distance(distance_M, d, last):
    """1 where a distance is min(d, last), else 0."""
    apart_M = tl.abs(distance_M - tl.minimum(d * 1.0, last * 1.0))
    return tl.maximum(1.0 - apart_M, 0.0)


@triton.jit
def hstu_kernel(
    q,
    k,
    v,
    position,
    before,
    out,
    num_rows,
    num_heads,
    num_distances,
    scale,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    DISTANCES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out = scale * sum over keys back in the history of silu(<q, k> + bias) v."""
    column_D, column_V = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    distance_M = tl.arange(0, DISTANCES).to(tl.float32)
    bias_M = tl.load(position + tl.arange(0, DISTANCES), mask=tl.arange(0, DISTANCES) < num_distances, other=0.0)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        is_row_B = row_B < num_rows
        length_B = tl.load(before + row_B, mask=is_row_B, other=-1) + 1
        q_BD = load_rows(q, tl.where(is_row_B, row_B, 0), is_row_B, column_D, DIM, COLUMNS, WIDE)
        total_BV = tl.zeros((BLOCK, VALUE_COLUMNS), dtype=tl.float32)
        for d in range(tl.max(length_B, axis=0)):
            is_there_B = holds(length_B, d)
            key_B = tl.where(is_there_B, row_B - d * num_heads, 0)
            bias = tl.sum(bias_M * at_distance(distance_M, d, num_distances - 1), axis=0)
            score_B = tl.sum(q_BD * load_rows(k, key_B, is_there_B, column_D, DIM, COLUMNS, WIDE), axis=1) + bias
            weight_B = tl.where(is_there_B, scale * score_B / (1.0 + tl.exp(-score_B)), 0.0)
            total_BV += weight_B[:, None] * load_rows(v, key_B, is_there_B, column_V, VALUE_DIM, VALUE_COLUMNS, WIDE)
        store_rows(out, row_B, is_row_B, column_V, total_BV, VALUE_DIM, VALUE_COLUMNS, WIDE)


@triton.jit
def hstu_query_grad_kernel(
    grad,
    q,
    k,
    v,
    position,
    before,
    of_q,
    of_position,
    num_rows,
    num_heads,
    num_distances,
    scale,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    DISTANCES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """of_q, and each program's sums of the gradients of the biases."""
    column_D, column_V = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    distance_M = tl.arange(0, DISTANCES).to(tl.float32)
    is_distance_M = tl.arange(0, DISTANCES) < num_distances
    bias_M = tl.load(position + tl.arange(0, DISTANCES), mask=is_distance_M, other=0.0)
    of_bias_M = tl.zeros((DISTANCES,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        is_row_B = row_B < num_rows
        own_B = tl.where(is_row_B, row_B, 0)
        length_B = tl.load(before + row_B, mask=is_row_B, other=-1) + 1
        q_BD = load_rows(q, own_B, is_row_B, column_D, DIM, COLUMNS, WIDE)
        grad_BV = load_rows(grad, own_B, is_row_B, column_V, VALUE_DIM, VALUE_COLUMNS, WIDE)
        of_q_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        for d in range(tl.max(length_B, axis=0)):
            is_there_B = holds(length_B, d)
            key_B = tl.where(is_there_B, row_B - d * num_heads, 0)
            chosen_M = at_distance(distance_M, d, num_distances - 1)
            k_BD = load_rows(k, key_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
            score_B = tl.sum(q_BD * k_BD, axis=1) + tl.sum(bias_M * chosen_M, axis=0)
            gate_B = 1.0 / (1.0 + tl.exp(-score_B))
            upstream_B = tl.sum(grad_BV * load_rows(v, key_B, is_there_B, column_V, VALUE_DIM, VALUE_COLUMNS, WIDE), axis=1)
            of_score_B = tl.where(is_there_B, upstream_B * scale * gate_B * (1.0 + score_B * (1.0 - gate_B)), 0.0)
            of_q_BD += of_score_B[:, None] * k_BD
            of_bias_M += chosen_M * tl.sum(of_score_B, axis=0)
        store_rows(of_q, row_B, is_row_B, column_D, of_q_BD, DIM, COLUMNS, WIDE)
    tl.store(of_position + tl.program_id(0) * num_distances + tl.arange(0, DISTANCES), of_bias_M, mask=is_distance_M)


@triton.jit
def hstu_key_grad_kernel(
    grad,
    q,
    k,
    v,
    position,
    behind,
    of_k,
    of_v,
    num_rows,
    num_heads,
    num_distances,
    scale,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    DISTANCES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """of_k and of_v: sums over the queries ahead in the history."""
    column_D, column_V = tl.arange(0, COLUMNS), tl.arange(0, VALUE_COLUMNS)
    distance_M = tl.arange(0, DISTANCES).to(tl.float32)
    bias_M = tl.load(position + tl.arange(0, DISTANCES), mask=tl.arange(0, DISTANCES) < num_distances, other=0.0)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK), tl.num_programs(0)):
        row_B = block * BLOCK + tl.arange(0, BLOCK)
        is_row_B = row_B < num_rows
        own_B = tl.where(is_row_B, row_B, 0)
        length_B = tl.load(behind + row_B, mask=is_row_B, other=-1) + 1
        k_BD = load_rows(k, own_B, is_row_B, column_D, DIM, COLUMNS, WIDE)
        v_BV = load_rows(v, own_B, is_row_B, column_V, VALUE_DIM, VALUE_COLUMNS, WIDE)
        of_k_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        of_v_BV = tl.zeros((BLOCK, VALUE_COLUMNS), dtype=tl.float32)
        for d in range(tl.max(length_B, axis=0)):
            is_there_B = holds(length_B, d)
            query_B = tl.where(is_there_B, row_B + d * num_heads, 0)
            bias = tl.sum(bias_M * at_distance(distance_M, d, num_distances - 1), axis=0)
            q_BD = load_rows(q, query_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
            score_B = tl.sum(q_BD * k_BD, axis=1) + bias
            gate_B = 1.0 / (1.0 + tl.exp(-score_B))
            grad_BV = load_rows(grad, query_B, is_there_B, column_V, VALUE_DIM, VALUE_COLUMNS, WIDE)
            weight_B = tl.where(is_there_B, scale * score_B * gate_B, 0.0)
            upstream_B = tl.sum(grad_BV * v_BV, axis=1)
            of_score_B = tl.where(is_there_B, upstream_B * scale * gate_B * (1.0 + score_B * (1.0 - gate_B)), 0.0)
            of_k_BD += of_score_B[:, None] * q_BD
            of_v_BV += weight_B[:, None] * grad_BV
        store_rows(of_k, row_B, is_row_B, column_D, of_k_BD, DIM, COLUMNS, WIDE)
        store_rows(of_v, row_B, is_row_B, column_V, of_v_BV, VALUE_DIM, VALUE_COLUMNS, WIDE)


def run(q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float) -> Tensor:
    out_NHV = torch.empty_like(v_NHV)
    if out_NHV.numel() and q_NHA.numel():
        before_R, _ = _rows(offsets, q_NHA)
        programs, shape = _launch(q_NHA, v_NHV, position_M)
        with on_device(q_NHA.device):
            hstu_kernel[(programs,)](q_NHA, k_NHA, v_NHV, position_M, before_R, out_NHV, *_counts(q_NHA, position_M), scale, **shape)
    return out_NHV


def backward(
    grad_NHV: Tensor, q_NHA: Tensor, k_NHA: Tensor, v_NHV: Tensor, position_M: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = torch.empty_like(q_NHA), torch.empty_like(k_NHA), torch.empty_like(v_NHV)
    if not (v_NHV.numel() and q_NHA.numel()):
        return of_q, of_k, of_v, torch.zeros_like(position_M)
    before_R, behind_R = _rows(offsets, q_NHA)
    programs, shape = _launch(q_NHA, v_NHV, position_M)
    of_position_PM = position_M.new_empty(programs, position_M.numel())
    given, counts = (grad_NHV, q_NHA, k_NHA, v_NHV, position_M), (*_counts(q_NHA, position_M), scale)
    with on_device(q_NHA.device):
        hstu_query_grad_kernel[(programs,)](*given, before_R, of_q, of_position_PM, *counts, **shape)
        hstu_key_grad_kernel[(programs,)](*given, behind_R, of_k, of_v, *counts, **shape)
    return of_q, of_k, of_v, of_position_PM.sum(0)


def _rows(offsets: Tensor, q_NHA: Tensor) -> tuple[Tensor, Tensor]:
    """Of every head of a position how many positions stand before it, and how many behind: int32 (N H,)."""
    before_N, behind_N = places(offsets, q_NHA.shape[0])
    first, second = (each_N.to(torch.int32).repeat_interleave(q_NHA.shape[1]) for each_N in (before_N, behind_N))
    return first, second


def _counts(q_NHA: Tensor, position_M: Tensor) -> tuple[int, int, int]:
    return q_NHA.shape[0] * q_NHA.shape[1], q_NHA.shape[1], position_M.numel()


def _launch(q_NHA: Tensor, v_NHV: Tensor, position_M: Tensor) -> tuple[int, dict[str, int]]:
    num_rows, device = q_NHA.shape[0] * q_NHA.shape[1], q_NHA.device
    rows, key_columns, value_columns = hstu_tile(q_NHA.shape[2], v_NHV.shape[2], device.type)
    shape = {"DIM": q_NHA.shape[2], "COLUMNS": key_columns, "VALUE_DIM": v_NHV.shape[2], "VALUE_COLUMNS": value_columns, "BLOCK": rows}
    wide = is_wide(num_rows, max(q_NHA.shape[2], v_NHV.shape[2]))
    shape |= {"DISTANCES": 1 << (position_M.numel() - 1).bit_length(), "WIDE": wide}
    return num_programs(num_rows, Tile(rows, key_columns), device), shape
