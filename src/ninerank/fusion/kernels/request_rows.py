"""The rows of one side of a request, from ids to what a graph reads, in one call outside the interpreter's lock.

A side has F features of one id a row, G bags and S sequences over R rows, all in the storage of one group. The kernel finds rows,
restores codes, pools bags and pads sequences, and writes what a graph takes: fields (R, F + G, D), sequences (R, L, D) one after
another, masks (R, L) one after another; in float32 or, for a graph that would round them next, in bfloat16 (sums in float32, rounded once).

    ids      int64, as `features.batch` lays them out: single (F * R), bags and sequences with lengths (G * R), (S * R)
    tables   int64 (F + G + S, 2): first row and number of rows of each feature's table in the storage
    storage  (V, D) float32, float16 or bfloat16, or uint8 rows as `quantized_rows` has them

Serving on a host alone calls it; training and other devices use the operators. Deterministic.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, fixed_dim, jit_for, jit_inline, prefetch
from ninerank.fusion.kernels.lanes import arithmetic, code_loads
from ninerank.fusion.kernels.quantized_rows import HEADER_BYTES, code_bytes, row_bytes

__all__ = ["ALL_IDS_VALID", "request_rows"]

ALL_IDS_VALID = -1
ROWS_AHEAD = 12


@cache
def request_rows(dim: int, stored: torch.dtype, bits: int, out: torch.dtype) -> Any:
    """Compiled kernel for a group's dim and storage; bits: 8 or 4 for codes (`stored` is uint8 then), else 0. out: float32 or bfloat16.

    It takes (storage, numbers, tables, is_mean, num_rows, single, bags, bag_lengths, sequences, sequence_lengths, widths, fields_out,
    sequences_out, masks_out), all flat but `tables`; numbers: the storage of codes as float32, any other storage unused. An empty
    masks_out is left alone. Returns ALL_IDS_VALID, or the number of a feature with an id outside its table, whose rows are then unfinished.
    """
    piece = code_bytes(dim, bits) if bits else dim
    fixed = fixed_dim(piece) if dim % piece == 0 else 0
    value, width = _values(fixed, dim, stored, bits, piece)
    ops = arithmetic(fixed, out)
    put, each = ops.store, ops.each
    elements = _row_bytes(dim, stored, bits) // stored.itemsize
    line = CACHE_LINE_BYTES // stored.itemsize

    @jit_for(dim, stored, bits, out)
    def look_up(
        storage,
        numbers,
        tables,
        is_mean,
        num_rows,
        single,
        bags,
        bag_lengths,
        sequences,
        sequence_lengths,
        widths,
        fields_out,
        sequences_out,
        masks_out,
    ):
        num_bags, num_sequences = is_mean.size, widths.size
        num_single = tables.shape[0] - num_bags - num_sequences
        num_fields = num_single + num_bags
        for f in range(num_single):
            first, size, own = tables[f, 0], tables[f, 1], f * num_rows
            for r in range(min(ROWS_AHEAD, num_rows)):
                for place in range(0, elements, line):
                    prefetch(storage, (first + single[own + r]) * elements + place)
            for r in range(num_rows):
                if r + ROWS_AHEAD < num_rows:
                    for place in range(0, elements, line):
                        prefetch(storage, (first + single[own + r + ROWS_AHEAD]) * elements + place)
                id_ = single[own + r]
                if id_ < 0 or id_ >= size:
                    return f
                target = (r * num_fields + f) * dim
                for column in range(0, dim, width):
                    put(fields_out, target + column, value(storage, numbers, first + id_, column))
        at = 0
        for g in range(num_bags):
            f = num_single + g
            first, size = tables[f, 0], tables[f, 1]
            for r in range(num_rows):
                length = bag_lengths[g * num_rows + r]
                for n in range(at, at + length):
                    if bags[n] < 0 or bags[n] >= size:
                        return f
                share = np.float32(1) / np.float32(max(length, 1)) if is_mean[g] else np.float32(1)
                target = (r * num_fields + f) * dim
                for column in range(0, dim, width):
                    total = each(np.float32(0))
                    for n in range(at, at + length):
                        total = total + value(storage, numbers, first + bags[n], column)
                    put(fields_out, target + column, total * each(share))
                at += length
        at, place = 0, 0
        for s in range(num_sequences):
            f = num_fields + s
            first, size, longest = tables[f, 0], tables[f, 1], widths[s]
            for r in range(num_rows):
                length = sequence_lengths[s * num_rows + r]
                if length > longest:
                    return f
                for n in range(length):
                    if n + ROWS_AHEAD < length:
                        prefetch(storage, (first + sequences[at + n + ROWS_AHEAD]) * elements)
                    id_ = sequences[at + n]
                    if id_ < 0 or id_ >= size:
                        return f
                    for column in range(0, dim, width):
                        put(sequences_out, (place + n) * dim + column, value(storage, numbers, first + id_, column))
                for n in range(length, longest):
                    for column in range(0, dim, width):
                        put(sequences_out, (place + n) * dim + column, each(np.float32(0)))
                if masks_out.size > 0:
                    for n in range(longest):
                        masks_out[place + n] = n < length
                at += length
                place += longest
        return ALL_IDS_VALID

    return look_up


def _row_bytes(dim: int, stored: torch.dtype, bits: int) -> int:
    return row_bytes(dim, bits) if bits else dim * stored.itemsize


def _values(fixed: int, dim: int, stored: torch.dtype, bits: int, piece: int) -> tuple[Any, int]:
    """Compiled `(storage, numbers, row, column) -> width columns` of a stored row, and the width."""
    if not bits:
        ops = arithmetic(fixed, stored)
        load = ops.load

        @jit_inline
        def plain(storage, numbers, row, column):
            return load(storage, row * dim + column)

        return plain, ops.width
    ops = arithmetic(fixed, torch.float32)
    each = ops.each
    whole, low, high = code_loads(fixed)
    stride = _row_bytes(dim, stored, bits)

    @jit_inline
    def code8(storage, numbers, row, column):
        scale, bias = numbers[row * (stride // 4)], numbers[row * (stride // 4) + 1]
        return each(bias) + each(scale) * whole(storage, row * stride + HEADER_BYTES + column)

    @jit_inline
    def code4(storage, numbers, row, column):
        scale, bias = numbers[row * (stride // 4)], numbers[row * (stride // 4) + 1]
        first = row * stride + HEADER_BYTES
        code = low(storage, first + column) if column < piece else high(storage, first + column - piece)
        return each(bias) + each(scale) * code

    return (code8 if bits == 8 else code4), ops.width
