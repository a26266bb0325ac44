"""Scores made true as probabilities: a monotone map from buckets of the score to the rates that were observed there.

Shape legend: N rows, K buckets.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ninerank.errors import DataError
from ninerank.metrics.calibration import Buckets
from ninerank.metrics.rows import Array, check_rows

__all__ = ["Recalibration"]


class Recalibration(NamedTuple):
    """Piecewise-linear map, ascending: float64 (K,) scores and the rates they stand for; beyond the ends in proportion to the score.

    >>> from ninerank.metrics import calibration
    >>> found = Recalibration.of(calibration([0, 0, 1, 0], [0.25, 0.25, 0.75, 0.75], num_buckets=2))
    >>> found(np.array([0.5, 0.75])).tolist()
    [0.25, 0.5]
    """

    score_K: Array
    rate_K: Array

    @classmethod
    def of(cls, buckets: Buckets) -> "Recalibration":
        """From calibration buckets; neighbours whose rates fall are joined (pool adjacent violators, Ayer et al. 1955).

        Raises DataError for buckets that hold no rows.
        """
        if not len(buckets.weight_K):
            raise DataError("no rows to recalibrate by")
        pooled: list[list[float]] = []  # weight, weighted score, positives
        for weight, score, positive in zip(buckets.weight_K, buckets.score_K * buckets.weight_K, buckets.positive_K, strict=True):
            pooled.append([float(weight), float(score), float(positive)])
            while len(pooled) > 1 and pooled[-2][2] * pooled[-1][0] >= pooled[-1][2] * pooled[-2][0]:
                last = pooled.pop()
                pooled[-1] = [a + b for a, b in zip(pooled[-1], last, strict=True)]
        weight_K, score_K, positive_K = np.array(pooled).T
        return cls(score_K / weight_K, positive_K / weight_K)

    def __call__(self, score_N: ArrayLike) -> Array:
        """float64 (N,): calibrated probabilities. Raises DataError for scores outside [0, 1]."""
        scores = np.asarray(score_N)
        score = check_rows(np.zeros(scores.shape, bool), scores, probability=True).score_B.astype(np.float64)
        rate = np.interp(score, self.score_K, self.rate_K)
        ends = ((score < self.score_K[0], 0), (score > self.score_K[-1], -1))
        for outside, end in ends:
            if self.score_K[end] > 0:
                rate = np.where(outside, score * self.rate_K[end] / self.score_K[end], rate)
        return np.clip(rate, 0.0, 1.0)

    def state(self) -> dict[str, Array]:
        return {"score": self.score_K.copy(), "rate": self.rate_K.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> "Recalibration":
        return cls(np.array(state["score"], np.float64), np.array(state["rate"], np.float64))
