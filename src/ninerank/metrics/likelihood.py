"""How probable the labels are under the scores: log loss, and log loss against the background rate.

Shape legend: B rows of one update, N rows in all.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from ninerank.metrics.accumulator import SumAccumulator
from ninerank.metrics.rows import Rows, check_rows

__all__ = ["CLIP", "LogLoss", "NormalizedEntropy", "logloss", "normalized_entropy"]

CLIP = 1e-7
"""Scores are clipped to [CLIP, 1 - CLIP]: the resolution of a float32 sigmoid near 1, so that a saturated score costs 16.1 nats."""


class LogLoss(SumAccumulator):
    """Mean negative log likelihood, in nats: -(sum_i w_i (y_i ln p_i + (1 - y_i) ln(1 - p_i))) / sum_i w_i.

    p is the score clipped to [1e-7, 1 - 1e-7]. nan without rows. Raises DataError for rows that `check_rows` refuses
    and for scores outside [0, 1].

    >>> round(LogLoss().update([1, 0], [0.8, 0.2]).value(), 4)
    0.2231
    """

    num_sums = 2

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> "LogLoss":
        rows = check_rows(label_B, score_B, weight_B, probability=True)
        self._sums += [_total_loss(rows), rows.total()]
        return self

    def value(self) -> float:
        loss, weight = self._sums.tolist()
        return loss / weight if weight > 0 else float("nan")


class NormalizedEntropy(SumAccumulator):
    """Log loss divided by that of the background rate alone: NE = logloss / -(r ln r + (1 - r) ln(1 - r)).

    r is the weighted share of positives (He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at
    Facebook"). Below 1 is better than the average rate, 0 is perfect; relative information gain is 1 - NE.
    nan where there are no positives or no negatives. Clipping and errors as `LogLoss`.

    >>> round(NormalizedEntropy().update([1, 0], [0.8, 0.2]).value(), 4)
    0.3219
    """

    num_sums = 3

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> "NormalizedEntropy":
        rows = check_rows(label_B, score_B, weight_B, probability=True)
        self._sums += [_total_loss(rows), rows.total(), rows.total(rows.label_B)]
        return self

    def value(self) -> float:
        loss, weight, positive = self._sums.tolist()
        if not 0 < positive < weight:
            return float("nan")
        rate = positive / weight
        background = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate)) if 0 < rate < 1 else 0.0
        return loss / weight / background if background > 0 else float("nan")


def logloss(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`LogLoss` of all rows at once."""
    return LogLoss().update(label_N, score_N, weight_N).value()


def normalized_entropy(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`NormalizedEntropy` of all rows at once."""
    return NormalizedEntropy().update(label_N, score_N, weight_N).value()


def _total_loss(rows: Rows) -> float:
    chance_B = np.clip(np.where(rows.label_B, rows.score_B, 1 - rows.score_B.astype(np.float64)), CLIP, 1 - CLIP)
    return -rows.total(np.log(chance_B))
