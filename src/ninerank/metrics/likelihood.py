"""How probable the labels are under the scores: log loss, and log loss against the background rate (NE, RIG).

Shape legend: B rows of one update, N rows in all.
"""

import numpy as np
from numpy.typing import ArrayLike

from ninerank.metrics.accumulator import SumAccumulator, ratio
from ninerank.metrics.rows import Array, Rows

__all__ = [
    "CLIP",
    "LogLoss",
    "NormalizedEntropy",
    "RelativeInformationGain",
    "logloss",
    "normalized_entropy",
    "relative_information_gain",
]

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

    @classmethod
    def terms(cls, rows: Rows) -> Array:
        return rows.weighted(_loss(rows), 1.0)

    @classmethod
    def of(cls, sums_SR: Array) -> Array:
        return ratio(sums_SR[0], sums_SR[1])


class NormalizedEntropy(SumAccumulator):
    """Log loss divided by that of the background rate alone: NE = logloss / -(r ln r + (1 - r) ln(1 - r)).

    r is the weighted share of positives (He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at
    Facebook"). Below 1 is better than the average rate, 0 is perfect; `RelativeInformationGain` is 1 - NE.
    nan where there are no positives or no negatives. Clipping and errors as `LogLoss`.

    >>> round(NormalizedEntropy().update([1, 0], [0.8, 0.2]).value(), 4)
    0.3219
    """

    num_sums = 3

    @classmethod
    def terms(cls, rows: Rows) -> Array:
        return rows.weighted(_loss(rows), 1.0, rows.label_B)

    @classmethod
    def of(cls, sums_SR: Array) -> Array:
        loss, weight, positive = sums_SR
        rate = np.where((positive > 0) & (positive < weight), ratio(positive, weight), np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            background = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            return np.where(background > 0, loss / weight / background, np.nan)


class RelativeInformationGain(NormalizedEntropy):
    """RIG = 1 - NE: the share of the labels' entropy that the scores explain. 0 is the average rate, 1 is perfect.

    >>> round(RelativeInformationGain().update([1, 0], [0.8, 0.2]).value(), 4)
    0.6781
    """

    @classmethod
    def of(cls, sums_SR: Array) -> Array:
        return 1 - super().of(sums_SR)


def logloss(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`LogLoss` of all rows at once."""
    return LogLoss().update(label_N, score_N, weight_N).value()


def normalized_entropy(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`NormalizedEntropy` of all rows at once."""
    return NormalizedEntropy().update(label_N, score_N, weight_N).value()


def relative_information_gain(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None) -> float:
    """`RelativeInformationGain` of all rows at once."""
    return RelativeInformationGain().update(label_N, score_N, weight_N).value()


def _loss(rows: Rows) -> Array:
    """float64 (B,): -ln of the chance that the score gave to the label."""
    chance_B = np.clip(np.where(rows.label_B, rows.score_B, 1 - rows.score_B.astype(np.float64)), CLIP, 1 - CLIP)
    loss_B: Array = -np.log(chance_B)
    return loss_B
