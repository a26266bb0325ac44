"""Groups and scores as unsigned codes of 32 bits, so that one plain sort of 64-bit keys orders rows within groups.

Shape legend: N rows.
"""

from collections.abc import Callable

import numpy as np

from ninerank.metrics.rows import Array

__all__ = ["HALF", "distinct", "group_codes", "score_codes"]

HALF = np.uint64(32)
# Keys whose range is no larger than this many times their number are counted off, not sorted.
SPARSEST = 4


def group_codes(group_N: Array) -> tuple[Array, Callable[[Array], Array]]:
    """uint64 codes below 2**32 in the order of the keys, and the way back."""
    low, high = (int(group_N.min()), int(group_N.max())) if len(group_N) else (0, 0)
    if high - low < 1 << 32:
        # Two's complement wraps around to the true difference, whatever the signs.
        return group_N.view(np.uint64) - np.uint64(low % (1 << 64)), lambda code: code.view(np.int64) + low
    # One permutation is far quicker here than looking each key up among the distinct ones.
    order = np.argsort(group_N)
    sorted_N = group_N[order]
    is_first_N = np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]])
    code_N = np.empty(len(group_N), np.uint64)
    code_N[order] = np.cumsum(is_first_N, dtype=np.uint64) - np.uint64(1)
    distinct = sorted_N[is_first_N]
    return code_N, lambda code: distinct[code.view(np.int64)]


def score_codes(score_N: Array) -> Array:
    """uint64 codes below 2**32 in the order of the scores: the float's own bits where it has 32, ranks else."""
    if score_N.dtype == np.float32:
        bits = score_N.view(np.uint32)
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    return np.unique(score_N, return_inverse=True)[1].astype(np.uint64)


def distinct(key_N: Array) -> tuple[Array, Array]:
    """Different keys, ascending, and the place of each row's key among them: np.unique, without a sort where keys lie close.

    >>> [column.tolist() for column in distinct(np.array([7, 5, 7]))]
    [[5, 7], [1, 0, 1]]
    """
    if len(key_N):
        low, high = int(key_N.min()), int(key_N.max())
        if high - low < SPARSEST * len(key_N):
            offset_N = key_N - low
            seen = np.zeros(high - low + 1, bool)
            seen[offset_N] = True
            return np.flatnonzero(seen) + low, (np.cumsum(seen) - 1)[offset_N]
    found, place_N = np.unique(key_N, return_inverse=True)
    return found, place_N
