"""Triton kernel of the fused update: a tile of touched rows is summed for, updated and written once.

What is one number a row (learning rate, row-wise state, Adam's bias corrections) is gathered and scattered by torch, so
that the kernel reads and writes it contiguously; whole rows of weights and state are gathered in the kernel.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import load_rows, store_rows, sum_segment
from ninerank.fusion.kernels.embedding_reduce.segments import by_row
from ninerank.fusion.kernels.embedding_reduce.triton import shortened
from ninerank.fusion.kernels.launch import Tile, is_wide, num_programs, on_device

__all__ = ["run", "update_kernel", "update_tile"]


@triton.jit
def update_kernel(
    weight,
    first,
    second,
    row_state,
    correction,
    grad,
    entries,
    scale,
    rows,
    starts,
    lengths,
    lr,
    grad_scale,
    num_segments,
    num_grads,
    weight_decay,
    max_gradient,
    max_row_norm,
    constant0,
    constant1,
    constant2,
    constant3,
    constant4,
    OPTIMIZER: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    CLIPS_VALUES: tl.constexpr,
    CLIPS_NORM: tl.constexpr,
    DECAYS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Update the rows of `num_segments` segments; row_state, correction and lr hold one number a segment."""
    column_D = tl.arange(0, COLUMNS)
    for block in range(tl.program_id(0), tl.cdiv(num_segments, BLOCK), tl.num_programs(0)):
        segment_B = block * BLOCK + tl.arange(0, BLOCK)
        is_there_B = segment_B < num_segments
        row_B = tl.load(rows + segment_B, mask=is_there_B, other=0)
        start_B = tl.load(starts + segment_B, mask=is_there_B, other=0)
        length_B = tl.load(lengths + segment_B, mask=is_there_B, other=0)
        lr_B = tl.load(lr + segment_B, mask=is_there_B, other=1.0)
        g_BD = sum_segment(grad, entries, scale, start_B, length_B, num_grads, column_D, DIM, BLOCK, COLUMNS, HAS_SCALE, WIDE)
        w_BD = load_rows(weight, row_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
        if HAS_GRAD_SCALE:
            g_BD = g_BD * tl.load(grad_scale)
        if CLIPS_VALUES:
            g_BD = tl.where(g_BD > max_gradient, max_gradient, tl.where(g_BD < -max_gradient, -max_gradient, g_BD))
        if CLIPS_NORM:
            norm_B = tl.sqrt(tl.sum(g_BD * g_BD, axis=1))
            g_BD = g_BD * (max_row_norm / tl.maximum(norm_B, max_row_norm))[:, None]
        if DECAYS:
            g_BD = g_BD + weight_decay * w_BD
        if OPTIMIZER == "sgd":
            w_BD = w_BD - lr_B[:, None] * g_BD
        elif OPTIMIZER == "rowwise_adagrad":
            sum_B = tl.load(row_state + segment_B, mask=is_there_B, other=1.0) + tl.sum(g_BD * g_BD, axis=1) / DIM
            tl.store(row_state + segment_B, sum_B, mask=is_there_B)
            w_BD = w_BD - (lr_B / (tl.sqrt(sum_B) + constant0))[:, None] * g_BD
        elif OPTIMIZER == "adagrad":
            sum_BD = load_rows(first, row_B, is_there_B, column_D, DIM, COLUMNS, WIDE) + g_BD * g_BD
            store_rows(first, row_B, is_there_B, column_D, sum_BD, DIM, COLUMNS, WIDE)
            w_BD = w_BD - lr_B[:, None] * g_BD / (tl.sqrt(sum_BD) + constant0)
        elif OPTIMIZER == "adam":
            m_BD = constant0 * load_rows(first, row_B, is_there_B, column_D, DIM, COLUMNS, WIDE) + constant3 * g_BD
            v_BD = constant1 * load_rows(second, row_B, is_there_B, column_D, DIM, COLUMNS, WIDE) + constant4 * g_BD * g_BD
            store_rows(first, row_B, is_there_B, column_D, m_BD, DIM, COLUMNS, WIDE)
            store_rows(second, row_B, is_there_B, column_D, v_BD, DIM, COLUMNS, WIDE)
            step_size_B = lr_B * tl.load(row_state + segment_B, mask=is_there_B, other=1.0)
            correct_B = tl.load(correction + segment_B, mask=is_there_B, other=1.0)
            w_BD = w_BD - step_size_B[:, None] * m_BD / (tl.sqrt(v_BD * correct_B[:, None]) + constant2)
        else:
            n_BD = load_rows(second, row_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
            new_n_BD = n_BD + g_BD * g_BD
            root_BD = tl.sqrt(new_n_BD)
            z_BD = load_rows(first, row_B, is_there_B, column_D, DIM, COLUMNS, WIDE)
            z_BD = z_BD + g_BD - (root_BD - tl.sqrt(n_BD)) / lr_B[:, None] * w_BD
            store_rows(first, row_B, is_there_B, column_D, z_BD, DIM, COLUMNS, WIDE)
            store_rows(second, row_B, is_there_B, column_D, new_n_BD, DIM, COLUMNS, WIDE)
            shrunk_BD = tl.where(z_BD > constant1, z_BD - constant1, tl.where(z_BD < -constant1, z_BD + constant1, 0.0))
            w_BD = -shrunk_BD / ((constant0 + root_BD) / lr_B[:, None] + constant2)
        store_rows(weight, row_B, is_there_B, column_D, w_BD, DIM, COLUMNS, WIDE)


def update_tile(optimizer: str, dim: int, device_type: str) -> Tile:
    """Tile of a rule: two states a row and what is computed from them are many live tiles."""
    return Tile.of(dim, device_type, many=optimizer in ("adam", "ftrl"))


def run(
    weight_RD: Tensor,
    state: list[Tensor],
    grad_GD: Tensor,
    rows_N: Tensor,
    grad_row_N: Tensor | None,
    scale_N: Tensor | None,
    first_row_T: Tensor,
    lr_T: Tensor,
    grad_scale: Tensor | None,
    optimizer: str,
    hyper: list[float],
) -> None:
    num_rows, dim = weight_RD.shape
    grad_GD, segments = shortened(grad_GD.to(torch.float32), by_row(rows_N, grad_row_N, scale_N, num_rows))
    rows_U = segments.rows_U
    if rows_U.numel() == 0:
        return
    weight_decay, max_gradient, max_row_norm, *constants = hyper
    lr_U = lr_T.to(torch.float32)[torch.bucketize(rows_U.to(torch.int64), first_row_T, right=True) - 1]
    row_state, correction = _row_state(optimizer, state, rows_U, constants)
    if optimizer == "adam":
        # 1 - beta is taken here, where it is exact: in float32 it would lose what makes beta differ from 1.
        constants += [1 - constants[0], 1 - constants[1]]
    first, second = (*state, weight_RD, weight_RD)[:2]
    tile = update_tile(optimizer, dim, weight_RD.device.type)
    with on_device(weight_RD.device):
        update_kernel[(num_programs(rows_U.numel(), tile, weight_RD.device),)](
            *(weight_RD, first, second, lr_U if row_state is None else row_state, lr_U if correction is None else correction),
            *(grad_GD, segments.entry_N, lr_U if segments.scale_N is None else segments.scale_N),
            *(rows_U, segments.starts_U, segments.lengths_U, lr_U, lr_U if grad_scale is None else grad_scale.to(torch.float32)),
            *(rows_U.numel(), grad_GD.shape[0], weight_decay, max_gradient, max_row_norm, *(*constants, 0.0, 0.0, 0.0, 0.0, 0.0)[:5]),
            OPTIMIZER=optimizer,
            DIM=dim,
            BLOCK=tile.rows,
            COLUMNS=tile.columns,
            HAS_SCALE=segments.scale_N is not None,
            HAS_GRAD_SCALE=grad_scale is not None,
            DECAYS=weight_decay > 0,
            CLIPS_VALUES=math.isfinite(max_gradient),
            CLIPS_NORM=math.isfinite(max_row_norm),
            WIDE=is_wide(max(num_rows, grad_GD.shape[0]), dim),
        )
    if optimizer == "rowwise_adagrad" and row_state is not None:
        state[0].index_copy_(0, rows_U.to(torch.int64), row_state)


def _row_state(optimizer: str, state: list[Tensor], rows_U: Tensor, constants: list[float]) -> tuple[Tensor | None, Tensor | None]:
    """What the kernel takes as one number a row; counts Adam's step."""
    wide_U = rows_U.to(torch.int64)
    if optimizer == "rowwise_adagrad":
        return state[0].index_select(0, wide_U), None
    if optimizer != "adam":
        return None, None
    step_U = state[2].index_select(0, wide_U) + 1
    state[2].index_copy_(0, wide_U, step_U)
    # 1 - b^t without the cancellation that a float32 power would bring.
    first, second = (
        -torch.expm1(step_U.to(torch.float32) * (math.log(beta) if beta else -math.inf)).reciprocal() for beta in constants[:2]
    )
    return first, second
