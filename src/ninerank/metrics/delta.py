"""Intervals of ratios and of all metrics made of sums, by the delta method, rows clustered by user or request.

Shape legend: B rows of one update, N rows in all, R columns of sums.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import State, SumAccumulator, ratio
from ninerank.metrics.clusters import ClusterSums
from ninerank.metrics.intervals import Interval, check_level
from ninerank.metrics.rows import Array, check_rows

__all__ = [
    "MetricDifference",
    "MetricInterval",
    "RatioInterval",
    "metric_difference",
    "metric_interval",
    "metric_named",
    "ratio_interval",
]


class RatioInterval(ClusterSums):
    """sum of above / sum of below with its interval by the delta method: rates, revenue per request, weighted means.

    With R the ratio and a_c, b_c the sums of cluster c: var = C / (C - 1) sum_c (a_c - R b_c)^2 / (sum_c b_c)^2.
    nan where the denominator's sum is not positive. Raises DataError for numbers that are not finite.

    >>> found = RatioInterval().update([1, 0, 1], [1, 1, 1]).value()
    >>> round(found.value, 4), round(found.standard_error, 4)
    (0.6667, 0.3333)
    """

    def __init__(self, level: float = 0.95) -> None:
        super().__init__(2)
        self.level = check_level(level)

    def update(self, above_B: ArrayLike, below_B: ArrayLike | None = None, cluster_B: ArrayLike | None = None) -> Self:
        """below_B: ones if None, which makes it a mean."""
        above = np.asarray(above_B, np.float64)
        sums = np.stack([above, np.ones(above.shape) if below_B is None else np.asarray(below_B, np.float64)])
        if above.ndim != 1 or not np.isfinite(sums).all():
            raise DataError(f"a ratio of columns of shape {above.shape}: finite numbers in one dimension are needed")
        self.add(sums, cluster_B)
        return self

    def value(self) -> Interval:
        return self.interval(lambda sums_SR: ratio(sums_SR[0], sums_SR[1]), self.level)

    def state(self) -> State:
        return {**super().state(), "level": np.array(self.level)}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(float(state["level"]))
        metric.merge_state(state)
        return metric


class MetricInterval(ClusterSums):
    """A metric made of sums (log loss, NE, RIG, PCOC) with its interval by the delta method, by cluster if one is given.

    metric: LogLoss, NormalizedEntropy, RelativeInformationGain, PCOC, or another SumAccumulator.

    >>> from ninerank.metrics import PCOC
    >>> found = MetricInterval(PCOC).update([1, 0, 1, 0], [0.5, 0.5, 0.75, 0.25]).value()
    >>> found.value, round(found.standard_error, 4)
    (1.0, 0.4564)
    """

    def __init__(self, metric: type[SumAccumulator], level: float = 0.95) -> None:
        super().__init__(metric.num_sums)
        self.metric, self.level = metric, check_level(level)

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, cluster_B: ArrayLike | None = None) -> Self:
        self.add(self.metric.terms(check_rows(label_B, score_B, weight_B, probability=self.metric.probability)), cluster_B)
        return self

    def merge(self, other: Self) -> Self:
        _check_same(self.metric, other.metric)
        return super().merge(other)

    def value(self) -> Interval:
        return self.interval(self.metric.of, self.level)

    def state(self) -> State:
        return {**super().state(), "metric": np.array(self.metric.__name__), "level": np.array(self.level)}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(metric_named(str(state["metric"])), float(state["level"]))
        metric.merge_state(state)
        return metric


class MetricDifference(ClusterSums):
    """Metric of scores A minus that of scores B over the same rows, with its paired interval. Otherwise as `MetricInterval`."""

    def __init__(self, metric: type[SumAccumulator], level: float = 0.95) -> None:
        super().__init__(2 * metric.num_sums)
        self.metric, self.level = metric, check_level(level)

    def update(
        self,
        label_B: ArrayLike,
        score_B: ArrayLike,
        other_B: ArrayLike,
        weight_B: ArrayLike | None = None,
        cluster_B: ArrayLike | None = None,
    ) -> Self:
        """score_B: scores of A. other_B: scores of B."""
        both = [check_rows(label_B, score, weight_B, probability=self.metric.probability) for score in (score_B, other_B)]
        self.add(np.concatenate([self.metric.terms(rows) for rows in both]), cluster_B)
        return self

    def merge(self, other: Self) -> Self:
        _check_same(self.metric, other.metric)
        return super().merge(other)

    def value(self) -> Interval:
        half = self.metric.num_sums
        return self.interval(lambda sums_SR: self.metric.of(sums_SR[:half]) - self.metric.of(sums_SR[half:]), self.level)

    def state(self) -> State:
        return {**super().state(), "metric": np.array(self.metric.__name__), "level": np.array(self.level)}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(metric_named(str(state["metric"])), float(state["level"]))
        metric.merge_state(state)
        return metric


def ratio_interval(
    above_N: ArrayLike, below_N: ArrayLike | None = None, *, cluster_N: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """`RatioInterval` of all rows at once: of GAUC, with `table = GAUC().groups()`, by `ratio_interval(w * auc, w)`."""
    return RatioInterval(level).update(above_N, below_N, cluster_N).value()


def metric_interval(
    metric: type[SumAccumulator],
    label_N: ArrayLike,
    score_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    *,
    cluster_N: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """`MetricInterval` of all rows at once."""
    return MetricInterval(metric, level).update(label_N, score_N, weight_N, cluster_N).value()


def metric_difference(
    metric: type[SumAccumulator],
    label_N: ArrayLike,
    score_N: ArrayLike,
    other_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    *,
    cluster_N: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """`MetricDifference` of all rows at once."""
    return MetricDifference(metric, level).update(label_N, score_N, other_N, weight_N, cluster_N).value()


def _check_same(mine: type[SumAccumulator], other: type[SumAccumulator]) -> None:
    if mine is not other:
        raise ValueError(f"an interval of {other.__name__} does not merge with one of {mine.__name__}")


def metric_named(name: str) -> type[SumAccumulator]:
    """The SumAccumulator of that name; raises ValueError if there is none."""
    known = SumAccumulator.__subclasses__()
    for metric in known:  # grows while it is walked: subclasses of subclasses
        if metric.__name__ == name:
            return metric
        known.extend(metric.__subclasses__())
    raise ValueError(f"no metric made of sums is called {name!r}")
