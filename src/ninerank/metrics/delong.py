"""Confidence intervals of AUC and of the difference of two models' AUC on the same rows, by DeLong's variance.

The structural components come from two sorts, O(n log n) (Sun & Xu 2014, "Fast Implementation of DeLong's Algorithm").

Shape legend: B rows of one update, N rows in all, P positives, M negatives.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import Accumulator, RowAccumulator, State
from ninerank.metrics.intervals import Interval, check_level, normal_interval
from ninerank.metrics.keys import distinct
from ninerank.metrics.rows import Array, Rows, check_rows

__all__ = ["AUCDifference", "AUCInterval", "auc_difference", "auc_interval"]


class AUCInterval(RowAccumulator):
    """AUC with DeLong's confidence interval (DeLong, DeLong & Clarke-Pearson 1988).

    With V_i the share of negatives that positive i is above (ties half), V_j the share of positives that negative j is
    below: var = sum_i (V_i - AUC)^2 / (P (P - 1)) + sum_j (V_j - AUC)^2 / (M (M - 1)). Weighted rows count by their
    weight throughout. With `clustered`, rows of one cluster (user, request) may depend on one another: what they add is
    summed by cluster first (Obuchowski 1997, up to factors n / (n - 1)).
    `value()` is nan without both classes, its bounds too where one class has a single row, or there is a single cluster.
    Raises DataError for rows that `check_rows` refuses, or for clusters that are missing or not asked for.

    >>> found = AUCInterval().update([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).value()
    >>> found.value, round(found.standard_error, 4)
    (0.75, 0.3536)
    """

    def __init__(self, level: float = 0.95, *, clustered: bool = False) -> None:
        super().__init__()
        self.level, self.grouped = check_level(level), clustered

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, cluster_B: ArrayLike | None = None) -> Self:
        _check_clusters(self.grouped, cluster_B)
        self._append(label_B, score_B, weight_B, cluster_B)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        if other.grouped != self.grouped:
            raise ValueError("rows with clusters do not merge with rows without")
        return super().merge(other)

    def value(self) -> Interval:
        rows, cluster_N = self._rows(), self._column("group") if self.grouped else None
        return _interval(*_components(rows), rows.label_B, cluster_N, self.level)

    def state(self) -> State:
        return {**super().state(), "level": np.array(self.level)}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(float(state["level"]), clustered="group" in state)
        metric._append(state["label"], state["score"], state.get("weight"), state.get("group"))
        return metric


class AUCDifference(Accumulator):
    """AUC of scores A minus AUC of scores B over the same rows, with DeLong's paired interval.

    The components of the two are subtracted row by row before they are squared, so that what both models find easy
    cancels. Clusters, weights and errors as `AUCInterval`.
    """

    def __init__(self, level: float = 0.95, *, clustered: bool = False) -> None:
        self._first, self._second = AUCInterval(level, clustered=clustered), AUCInterval(level)

    def update(
        self,
        label_B: ArrayLike,
        score_B: ArrayLike,
        other_B: ArrayLike,
        weight_B: ArrayLike | None = None,
        cluster_B: ArrayLike | None = None,
    ) -> Self:
        """score_B: scores of A. other_B: scores of B."""
        _check_clusters(self._first.grouped, cluster_B)
        check_rows(label_B, other_B, weight_B)
        self._first.update(label_B, score_B, weight_B, cluster_B)
        self._second.update(label_B, other_B, weight_B)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._first.merge(other._first)
        self._second.merge(other._second)
        return self

    def value(self) -> Interval:
        first, second = self._first._rows(), self._second._rows()
        (auc_a, own_a), (auc_b, own_b) = _components(first), _components(second)
        cluster_N = self._first._column("group") if self._first.grouped else None
        return _interval(auc_a - auc_b, own_a - own_b, first.label_B, cluster_N, self._first.level)

    def state(self) -> State:
        return {**self._first.state(), "other": self._second.state()["score"]}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(float(state["level"]), clustered="group" in state)
        return metric.update(state["label"], state["score"], state["other"], state.get("weight"), state.get("group"))


def auc_interval(
    label_N: ArrayLike,
    score_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    *,
    cluster_N: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """`AUCInterval` of all rows at once."""
    return AUCInterval(level, clustered=cluster_N is not None).update(label_N, score_N, weight_N, cluster_N).value()


def auc_difference(
    label_N: ArrayLike,
    score_N: ArrayLike,
    other_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    *,
    cluster_N: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval:
    """`AUCDifference` of all rows at once."""
    return AUCDifference(level, clustered=cluster_N is not None).update(label_N, score_N, other_N, weight_N, cluster_N).value()


class _Side(NamedTuple):
    """Scores of one class in ascending order, and the weight of the first 0, 1, 2, ... of them."""

    score: Array
    mass: Array

    @classmethod
    def of(cls, score: Array, weight: Array | None) -> "_Side":
        if weight is None:
            return cls(np.sort(score), np.arange(len(score) + 1, dtype=np.float64))
        order = np.argsort(score)
        return cls(score[order], np.concatenate([[0.0], np.cumsum(weight[order])]))

    def below(self, score: Array) -> Array:
        """float64: share of this class below each score, ties half. Looked up in ascending order, which stays in the cache."""
        order = np.argsort(score)
        found = np.empty(len(score))
        ascending = score[order]
        twice = self.mass[np.searchsorted(self.score, ascending, "left")] + self.mass[np.searchsorted(self.score, ascending, "right")]
        found[order] = twice / (2 * self.mass[-1])
        return found


def _components(rows: Rows) -> tuple[float, Array]:
    """AUC, and what each row adds to its error: w_i (V_i - AUC) / W of its class, float64 (N,). All nan without both classes."""
    label_N, score_N, weight_N = rows.label_B, rows.score_B, rows.weight_B
    up, down = (None, None) if weight_N is None else (weight_N[label_N], weight_N[~label_N])
    positive, negative = _Side.of(score_N[label_N], up), _Side.of(score_N[~label_N], down)
    if not (positive.mass[-1] > 0 and negative.mass[-1] > 0):
        return float("nan"), np.full(len(label_N), np.nan)
    won, lost = negative.below(score_N[label_N]), 1 - positive.below(score_N[~label_N])
    auc = float(np.average(won, weights=up))
    own_N = np.empty(len(label_N))
    own_N[label_N] = (won - auc) * (1 if up is None else up) / positive.mass[-1]
    own_N[~label_N] = (lost - auc) * (1 if down is None else down) / negative.mass[-1]
    return auc, own_N


def _interval(value: float, own_N: Array, label_N: Array, cluster_N: Array | None, level: float) -> Interval:
    if cluster_N is None:
        return normal_interval(value, _square_sum(own_N[label_N]) + _square_sum(own_N[~label_N]), level)
    key_C, place_N = distinct(cluster_N)
    return normal_interval(value, _square_sum(np.bincount(place_N, own_N)), level, max(1, len(key_C) - 1))


def _square_sum(own: Array) -> float:
    """sum of squares times n / (n - 1)."""
    return float(own @ own) * len(own) / (len(own) - 1) if len(own) > 1 else float("nan")


def _check_clusters(clustered: bool, cluster_B: ArrayLike | None) -> None:
    if clustered and cluster_B is None:
        raise DataError("clusters were asked for and cluster_B is missing: one integer key per row is needed")
    if not clustered and cluster_B is not None:
        raise DataError("cluster_B is given, and the metric was made without clusters: make it with clustered=True")
