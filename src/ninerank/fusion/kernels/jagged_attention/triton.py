"""Triton kernels: tiles of histories for the sums, tiles of positions for the gradients, so that every store is contiguous.

What is one number a history (the softmax's logarithm of the sum, the mean gradient) is gathered by torch for each position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import holds, is_row, load_rows, store_rows
from ninerank.fusion.kernels.jagged import history_of
from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["attention_kernel", "backward", "gradient_kernel", "run"]


@triton.jit
def attention_kernel(
    score,
    key,
    starts,
    lengths,
    out,
    log_total,
    num_histories,
    SOFTMAX: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[b] = sum of w * key over its history; with SOFTMAX also the logarithm of its sum of exp(score)."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_histories, BLOCK), tl.num_programs(0)):
        history_B = block * BLOCK + tl.arange(0, BLOCK)
        is_history_B = history_B < num_histories
        start_B = tl.load(starts + history_B, mask=is_history_B, other=0)
        length_B = tl.load(lengths + history_B, mask=is_history_B, other=0)
        longest = tl.max(length_B, axis=0)
        total_BD = tl.zeros((BLOCK, COLUMNS), dtype=tl.float32)
        if SOFTMAX:
            greatest_B = tl.full((BLOCK,), -3.0e38, dtype=tl.float32)
            for i in range(longest):
                is_there_B = holds(length_B, i)
                own_B = tl.load(score + tl.where(is_there_B, start_B + i, 0), mask=is_there_B, other=-3.0e38)
                greatest_B = tl.maximum(greatest_B, own_B)
            norm_B = tl.zeros((BLOCK,), dtype=tl.float32)
            for i in range(longest):
                is_there_B = holds(length_B, i)
                position_B = tl.where(is_there_B, start_B + i, 0)
                own_B = tl.load(score + position_B, mask=is_there_B, other=-3.0e38)
                weight_B = tl.where(is_there_B, tl.exp(own_B - greatest_B), 0.0)
                norm_B += weight_B
                key_BD = load_rows(key, position_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
                total_BD += weight_B[:, None] * key_BD
            norm_B = tl.where(norm_B == 0.0, 1.0, norm_B)
            total_BD = total_BD / norm_B[:, None]
            tl.store(log_total + history_B, greatest_B + tl.log(norm_B), mask=is_history_B)
        else:
            for i in range(longest):
                is_there_B = holds(length_B, i)
                position_B = tl.where(is_there_B, start_B + i, 0)
                weight_B = tl.load(score + position_B, mask=is_there_B, other=0.0)
                key_BD = load_rows(key, position_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
                total_BD += weight_B[:, None] * key_BD
        store_rows(out, history_B, is_history_B, column_D, total_BD, DIM, COLUMNS, WIDE)


@triton.jit
def gradient_kernel(
    grad,
    weight,
    mean,
    key,
    histories,
    score_grad,
    key_grad,
    num_positions,
    num_histories,
    SOFTMAX: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """key_grad[n] = weight[n] * grad[b]; score_grad[n] = <grad[b], key[n]>, with SOFTMAX weight[n] * (that - mean[n])."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_positions, BLOCK), tl.num_programs(0)):
        position_B = block * BLOCK + tl.arange(0, BLOCK)
        is_there_B = position_B < num_positions
        history_B = tl.load(histories + position_B, mask=is_there_B, other=-1)
        has_grad_B = is_row(history_B, num_histories)
        weight_B = tl.load(weight + position_B, mask=is_there_B, other=0.0)
        grad_BD = load_rows(grad, tl.where(has_grad_B, history_B, 0), has_grad_B, column_D, DIM, COLUMNS, WIDE)
        key_BD = load_rows(key, position_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
        dot_B = tl.sum(grad_BD * key_BD, axis=1)
        if SOFTMAX:
            dot_B = weight_B * (dot_B - tl.load(mean + position_B, mask=is_there_B, other=0.0))
        tl.store(score_grad + position_B, dot_B, mask=is_there_B)
        store_rows(key_grad, position_B, is_there_B, column_D, weight_B[:, None] * grad_BD, DIM, COLUMNS, WIDE)


def run(score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> Tensor:
    return _attend(score_N, key_ND, offsets, softmax)[0]


def backward(grad_BD: Tensor, score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    num_positions, dim = key_ND.shape
    device = key_ND.device
    score_grad_N, key_grad_ND = torch.empty_like(score_N), torch.empty_like(key_ND)
    if key_grad_ND.numel() == 0:
        return score_grad_N.zero_(), key_grad_ND
    history_N = history_of(offsets, num_positions).to(torch.int32)
    weight_N, mean_N = score_N, score_N
    if softmax:
        out_BD, log_total_B = _attend(score_N, key_ND, offsets, softmax)
        weight_N = (score_N - log_total_B.index_select(0, history_N)).exp()
        mean_N = (grad_BD * out_BD).sum(1).index_select(0, history_N)
    tile = Tile.of(dim, device.type, gathered_bytes=4)
    with on_device(device):
        gradient_kernel[(num_programs(num_positions, tile, device),)](
            *(grad_BD, weight_N, mean_N, key_ND, history_N, score_grad_N, key_grad_ND, num_positions, grad_BD.shape[0]),
            SOFTMAX=softmax,
            DIM=dim,
            BLOCK=tile.rows,
            COLUMNS=tile.columns,
            WIDE=is_wide(num_positions, dim),
        )
    return score_grad_N, key_grad_ND


def _attend(score_N: Tensor, key_ND: Tensor, offsets: Tensor, softmax: bool) -> tuple[Tensor, Tensor]:
    """Sums (B, D), and with softmax the logarithm (B,) of each history's sum of exponentials."""
    num_positions, dim = key_ND.shape
    num_histories, device = offsets.numel() - 1, key_ND.device
    out_BD, log_total_B = torch.zeros(num_histories, dim, device=device), torch.zeros(num_histories, device=device)
    if out_BD.numel() and num_positions:
        tile = Tile.of(dim, device.type, gathered_bytes=4)
        with on_device(device):
            attention_kernel[(num_programs(num_histories, tile, device),)](
                *(score_N, key_ND, offsets[:-1].to(torch.int32), offsets.diff().to(torch.int32), out_BD, log_total_B, num_histories),
                SOFTMAX=softmax,
                DIM=dim,
                BLOCK=tile.rows,
                COLUMNS=tile.columns,
                WIDE=is_wide(num_positions, dim),
            )
    return out_BD, log_total_B
