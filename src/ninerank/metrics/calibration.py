"""Whether scores are true as probabilities: PCOC, calibration by bucket, expected calibration error, score histogram.

Shape legend: B rows of one update, K buckets, M fine bins.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.metrics.accumulator import Accumulator, State, SumAccumulator, ratio
from ninerank.metrics.rows import Array, Rows, check_rows

__all__ = ["PCOC", "Buckets", "Calibration", "ScoreHistogram", "calibration", "ece", "pcoc"]

By = Literal["mass", "width"]

# A float32 in [0, 1] without its last 15 bits: bins a 256th of an octave wide, at most 0.4% of the score.
DROPPED_BITS = 15
NUM_FINE_BINS = (int(np.float32(1).view(np.uint32)) >> DROPPED_BITS) + 1


class Buckets(NamedTuple):
    """Rows by score: float64 (K,) each, empty buckets left out.

    low_K, high_K: bounds of the bucket. weight_K: rows, or the sum of their weights. positive_K: weight of the
    positives. score_K: mean score. rate_K: share of positives, which a calibrated score equals.
    """

    low_K: Array
    high_K: Array
    weight_K: Array
    positive_K: Array
    score_K: Array
    rate_K: Array

    @property
    def pcoc_K(self) -> Array:
        """float64 (K,): predicted over observed positives of each bucket; nan without positives."""
        return ratio(self.score_K * self.weight_K, self.positive_K)

    @property
    def ece(self) -> float:
        """Expected calibration error: sum_k w_k |rate_k - score_k| / sum_k w_k (Naeini et al. 2015). nan without rows."""
        total = self.weight_K.sum()
        return float((self.weight_K * np.abs(self.rate_K - self.score_K)).sum() / total) if total > 0 else float("nan")


class PCOC(SumAccumulator):
    """Predicted clicks over clicks: sum_i w_i p_i / sum_i w_i y_i. 1 is calibrated on average, above 1 predicts too much.

    nan without positives. Raises DataError for rows that `check_rows` refuses and for scores outside [0, 1].

    >>> PCOC().update([1, 0, 0, 0], [0.5, 0.25, 0.25, 0.25]).value()
    1.25
    """

    num_sums = 2

    @classmethod
    def terms(cls, rows: Rows) -> Array:
        return rows.weighted(rows.score_B, rows.label_B)

    @classmethod
    def of(cls, sums_SR: Array) -> Array:
        return ratio(sums_SR[0], sums_SR[1])


class ScoreHistogram(Accumulator):
    """Weight, positives and score sum in 32,513 bins of at most 0.4% relative width, from which coarser ones are joined.

    One vector of sums whatever the scores, so it merges, and buckets of equal mass need not be known beforehand.
    Raises DataError for rows that `check_rows` refuses and for scores outside [0, 1].
    """

    def __init__(self) -> None:
        self._sums = np.zeros((3, NUM_FINE_BINS))

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> Self:
        rows = check_rows(label_B, score_B, weight_B, probability=True)
        weight_B = np.ones(len(rows)) if rows.weight_B is None else rows.weight_B
        bin_B = rows.score_B.astype(np.float32).view(np.uint32) >> DROPPED_BITS
        self._sums += _sums_by(bin_B, NUM_FINE_BINS, rows.label_B, rows.score_B, weight_B)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._sums = self._sums + other._sums
        return self

    def state(self) -> State:
        return {"sums": self._sums.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls()
        metric._sums = np.array(state["sums"], np.float64).reshape(3, NUM_FINE_BINS)
        return metric

    def totals(self) -> tuple[float, float, float]:
        """Weight, weight of the positives, and weighted sum of scores over all rows."""
        weight, positive, score = self._sums.sum(1).tolist()
        return weight, positive, score

    def equal_mass(self, num_buckets: int) -> Buckets:
        """At most `num_buckets` buckets of about the same weight each; a fine bin is never split."""
        weight_M = self._sums[0]
        end_M = np.cumsum(weight_M)
        middle_M = end_M - weight_M / 2
        bucket_M = np.minimum((middle_M / (end_M[-1] or 1.0) * num_buckets).astype(np.int64), num_buckets - 1)
        edges = _fine_edges()
        first = np.searchsorted(bucket_M, np.arange(num_buckets + 1))
        return _buckets(edges[first[:-1]], edges[first[1:]], np.stack([np.bincount(bucket_M, row, num_buckets) for row in self._sums]))

    def between(self, edge_K1: ArrayLike) -> Buckets:
        """Buckets between the ascending edges (the last one closed), each fine bin counted where its mean score lies."""
        edges = np.asarray(edge_K1, np.float64)
        filled = self._sums[0] > 0
        sums = self._sums[:, filled]
        bucket_M = np.searchsorted(edges, sums[2] / sums[0], "right") - 1
        bucket_M[sums[2] / sums[0] == edges[-1]] = len(edges) - 2
        inside = (bucket_M >= 0) & (bucket_M < len(edges) - 1)
        joined = np.stack([np.bincount(bucket_M[inside], row[inside], len(edges) - 1) for row in sums])
        return _buckets(edges[:-1], edges[1:], joined)


class Calibration(Accumulator):
    """Mean score against share of positives in buckets of the score.

    by="mass" (default): buckets of equal weight, whose bounds are exact to 0.4% of the score; CTR scores crowd near 0,
    where buckets of equal width say little. by="width": [k/K, (k+1)/K), the last one closed.
    `value()` gives the filled buckets, `.ece` their expected calibration error.
    Raises DataError for rows that `check_rows` refuses and for scores outside [0, 1].

    >>> found = Calibration(2, by="width").update([0, 1, 1], [0.25, 0.75, 1.0]).value()
    >>> found.score_K.tolist(), found.rate_K.tolist(), round(found.ece, 4)
    ([0.25, 0.875], [0.0, 1.0], 0.1667)
    """

    def __init__(self, num_buckets: int = 20, by: By = "mass") -> None:
        if num_buckets < 1:
            raise ValueError(f"num_buckets is {num_buckets}, at least 1 is needed")
        if by not in ("mass", "width"):
            raise ValueError(f"by is {by!r}, 'mass' or 'width' is needed")
        self.num_buckets = num_buckets
        self.by = by
        self._histogram = ScoreHistogram()
        self._sums = np.zeros((3, num_buckets))

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> Self:
        if self.by == "mass":
            self._histogram.update(label_B, score_B, weight_B)
            return self
        rows = check_rows(label_B, score_B, weight_B, probability=True)
        weights = np.ones(len(rows)) if rows.weight_B is None else rows.weight_B
        bucket_B = np.minimum((rows.score_B.astype(np.float64) * self.num_buckets).astype(np.int64), self.num_buckets - 1)
        self._sums += _sums_by(bucket_B, self.num_buckets, rows.label_B, rows.score_B, weights)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        if (self.num_buckets, self.by) != (other.num_buckets, other.by):
            raise ValueError(f"{other.num_buckets} buckets by {other.by} do not merge with {self.num_buckets} by {self.by}")
        self._histogram.merge(other._histogram)
        self._sums = self._sums + other._sums
        return self

    def value(self) -> Buckets:
        if self.by == "mass":
            return self._histogram.equal_mass(self.num_buckets)
        edges = np.arange(self.num_buckets + 1) / self.num_buckets
        return _buckets(edges[:-1], edges[1:], self._sums)

    def state(self) -> State:
        sums = self._histogram.state()["sums"] if self.by == "mass" else self._sums.copy()
        return {"sums": sums, "num_buckets": np.array(self.num_buckets), "by_mass": np.array(self.by == "mass")}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(int(state["num_buckets"]), "mass" if state["by_mass"] else "width")
        if metric.by == "mass":
            metric._histogram = ScoreHistogram.from_state(state)
        else:
            metric._sums = np.array(state["sums"], np.float64).reshape(3, metric.num_buckets)
        return metric


def pcoc(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`PCOC` of all rows at once."""
    return PCOC().update(label_N, score_N, weight_N).value()


def calibration(
    label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, num_buckets: int = 20, by: By = "mass"
) -> Buckets:
    """`Calibration` of all rows at once."""
    return Calibration(num_buckets, by).update(label_N, score_N, weight_N).value()


def ece(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, num_buckets: int = 20, by: By = "mass") -> float:
    """Expected calibration error over the buckets of `calibration`."""
    return calibration(label_N, score_N, weight_N, num_buckets=num_buckets, by=by).ece


def _sums_by(bucket_B: Array, num_buckets: int, label_B: Array, score_B: Array, weight_B: Array) -> Array:
    """float64 (3, num_buckets): weight, weight of positives, weighted score."""
    return np.stack([np.bincount(bucket_B, values, num_buckets) for values in (weight_B, weight_B * label_B, weight_B * score_B)])


def _buckets(low_K: Array, high_K: Array, sums_3K: Array) -> Buckets:
    filled = sums_3K[0] > 0
    weight_K, positive_K, score_K = sums_3K[:, filled]
    return Buckets(low_K[filled], high_K[filled], weight_K, positive_K, score_K / weight_K, positive_K / weight_K)


def _fine_edges() -> Array:
    """float64 (M + 1,) lower bounds of the fine bins, and 1."""
    edges = (np.arange(NUM_FINE_BINS + 1, dtype=np.uint32) << DROPPED_BITS).view(np.float32).astype(np.float64)
    return np.minimum(edges, 1.0)
