"""Stable radix sort of a batch's rows, each thread sorting its own range of rows (Numba).

Thread t takes the rows of a contiguous range of the storage, chosen from a histogram so that the threads' shares are
about even. All entries of one row so end in one thread, in the order of the batch: whatever is summed over them does
not depend on the number of threads, and threads need not wait for one another.
"""

import numpy as np

from ninerank.fusion.kernels.jit import jit

__all__ = ["SORTED", "sort_share"]

SORTED = -1
MAX_DIGIT_BITS = 11


@jit
def sort_share(rows, payload, num_rows, thread, num_threads):
    """(SORTED, keys, payloads) of this thread's entries, by row, then by position; (position, .., ..) of a row outside.

    rows: integer (N,) in [0, num_rows). payload: int32 (N,) carried along, or None for the positions themselves.
    """
    count = rows.size
    bits = 1
    while np.int64(1) << bits < num_rows:
        bits += 1
    num_passes = (bits + MAX_DIGIT_BITS - 1) // MAX_DIGIT_BITS
    digit_bits = (bits + num_passes - 1) // num_passes
    num_digits = np.int64(1) << digit_bits
    top_shift = digit_bits * (num_passes - 1)

    top_start = np.zeros(num_digits + 1, np.int64)
    for n in range(count):
        row = np.int64(rows[n])
        if row < 0 or row >= num_rows:
            return n, np.empty(0, rows.dtype), np.empty(0, np.int32)
        top_start[(row >> top_shift) + 1] += 1
    for digit in range(num_digits):
        top_start[digit + 1] += top_start[digit]

    low, high = np.int64(num_digits), np.int64(0)
    for digit in range(num_digits):
        if top_start[digit] < top_start[digit + 1] and top_start[digit] * num_threads // count == thread:
            low, high = min(low, digit), max(high, digit + 1)
    if high <= low:
        return SORTED, np.empty(0, rows.dtype), np.empty(0, np.int32)
    first_row, end_row = low << top_shift, high << top_shift
    base = top_start[low]
    share = top_start[high] - base

    keys, carried = np.empty(share, rows.dtype), np.empty(share, np.int32)
    spare_keys, spare_carried = np.empty(share, rows.dtype), np.empty(share, np.int32)
    start = np.empty(num_digits, np.int64)
    for number in range(num_passes):
        shift = digit_bits * number
        mask = num_digits - 1
        if number == num_passes - 1:
            for digit in range(num_digits):
                start[digit] = top_start[digit] - base
        else:
            start[:] = 0
            if number == 0:
                for n in range(count):
                    row = np.int64(rows[n])
                    if first_row <= row < end_row:
                        start[(row >> shift) & mask] += 1
            else:
                for n in range(share):
                    start[(np.int64(keys[n]) >> shift) & mask] += 1
            total = np.int64(0)
            for digit in range(num_digits):
                here = start[digit]
                start[digit] = total
                total += here
        if number == 0:
            for n in range(count):
                row = np.int64(rows[n])
                if first_row <= row < end_row:
                    digit = (row >> shift) & mask
                    slot = start[digit]
                    start[digit] = slot + 1
                    spare_keys[slot] = rows[n]
                    spare_carried[slot] = n if payload is None else payload[n]
        else:
            for n in range(share):
                digit = (np.int64(keys[n]) >> shift) & mask
                slot = start[digit]
                start[digit] = slot + 1
                spare_keys[slot] = keys[n]
                spare_carried[slot] = carried[n]
        keys, spare_keys = spare_keys, keys
        carried, spare_carried = spare_carried, carried
    return SORTED, keys, carried
