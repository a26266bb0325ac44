"""AUC in constant memory: rows counted in fine bins of their score, with a bound on what that can cost.

Shape legend: B rows of one update, M bins.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import Accumulator, State
from ninerank.metrics.rows import Array, check_rows

__all__ = ["BoundedAUC", "BucketedAUC", "bucketed_auc"]

# A float32 without its last 15 bits: sign, exponent and 8 bits of fraction.
DROPPED_BITS = 15
NUM_BINS = 1 << (32 - DROPPED_BITS)
CHUNK_ROWS = 1 << 18
LARGEST = float(np.finfo(np.float32).max)


class BoundedAUC(NamedTuple):
    """AUC of binned scores, and how far the exact one can lie from it: |exact - auc| <= bound. nan without both classes."""

    auc: float
    bound: float


class BucketedAUC(Accumulator):
    """AUC from a histogram of 131,072 bins over all finite scores, each at most 1/256 of its score wide.

    Pairs in different bins are counted exactly and pairs in one bin as ties, so with P_m positives and N_m negatives
    in bin m the error is at most sum_m P_m N_m / (2 P N), which `value()` gives along. It is the share of pairs that
    the bins cannot tell apart, halved: for scores spread over k even bins, 1 / 2k. No rows are kept, and the sums merge.
    Raises DataError for rows that `check_rows` refuses.

    >>> BucketedAUC().update([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).value()
    BoundedAUC(auc=0.75, bound=0.0)
    """

    def __init__(self) -> None:
        self._sums = np.zeros(2 * NUM_BINS)

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> Self:
        added = np.zeros(2 * NUM_BINS)  # so that a refused update leaves nothing behind
        try:
            for chunk in _chunks(np.asarray(label_B), np.asarray(score_B), None if weight_B is None else np.asarray(weight_B)):
                rows = check_rows(*chunk)
                added += np.bincount(_bins(rows.score_B) * 2 + rows.label_B, rows.weight_B, 2 * NUM_BINS)
        except DataError:
            check_rows(label_B, score_B, weight_B)  # names the row by its place in the whole update
            raise
        self._sums += added
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._sums = self._sums + other._sums
        return self

    def value(self) -> BoundedAUC:
        negative_M, positive_M = self._sums.reshape(NUM_BINS, 2).T
        positive, negative = float(positive_M.sum()), float(negative_M.sum())
        if not (positive > 0 and negative > 0):
            return BoundedAUC(float("nan"), float("nan"))
        share_M, tied_M = positive_M / positive, negative_M / negative
        below_M = np.cumsum(tied_M) - tied_M / 2
        return BoundedAUC(min(1.0, float(share_M @ below_M)), float(share_M @ tied_M) / 2)

    def state(self) -> State:
        """The filled bins alone."""
        filled = np.flatnonzero(self._sums)
        return {"bin": filled, "sum": self._sums[filled]}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls()
        metric._sums[np.asarray(state["bin"], np.int64)] = state["sum"]
        return metric


def bucketed_auc(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> BoundedAUC:
    """`BucketedAUC` of all rows at once."""
    return BucketedAUC().update(label_N, score_N, weight_N).value()


def _chunks(label_B: Array, score_B: Array, weight_B: Array | None) -> Iterator[tuple[Array, Array, Array | None]]:
    """Parts that stay in the cache; the whole update where its columns do not fit each other, for `check_rows` to refuse."""
    same = label_B.ndim == 1 and label_B.shape == score_B.shape and (weight_B is None or weight_B.shape == label_B.shape)
    if not same:
        yield label_B, score_B, weight_B
        return
    for start in range(0, len(label_B), CHUNK_ROWS):
        own = slice(start, start + CHUNK_ROWS)
        yield label_B[own], score_B[own], None if weight_B is None else weight_B[own]


def _bins(score_B: Array) -> Array:
    """Bin of each score, in the order of the scores. Rounding float64 to float32 keeps the order, if not every difference."""
    if score_B.dtype != np.float32:
        score_B = np.clip(score_B, -LARGEST, LARGEST).astype(np.float32)
    bits_B = score_B.view(np.int32)
    # Negative floats grow downwards: their other 31 bits are turned over. As integers the codes then run from -2**31.
    turned_B = bits_B ^ ((bits_B >> 31) & np.int32(0x7FFFFFFF))
    code_B: Array = (turned_B >> DROPPED_BITS) + (NUM_BINS >> 1)
    return code_B
