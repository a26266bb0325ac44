"""Sums by user or request, and intervals of smooth functions of them by the delta method.

Rows of one user are not independent: a click-rate's error computed row by row is too small, often by half. Here sums are
kept by cluster, and merge over any split of the rows, of clusters cut in two as well. Without clusters, each row is one,
and second moments alone are kept: constant memory.

Shape legend: B rows of one update, C clusters, S sums.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.metrics.accumulator import Accumulator, State
from ninerank.metrics.intervals import Interval, normal_interval
from ninerank.metrics.keys import distinct
from ninerank.metrics.rows import Array, check_groups

__all__ = ["ClusterSums"]

Statistic = Callable[[Array], Array]
# Relative step of the central difference that takes the place of the gradient: its error is of the order of the step squared.
STEP = 1e-5


class ClusterSums(Accumulator):
    """Sums by cluster, and of single rows their first and second moments."""

    def __init__(self, num_sums: int) -> None:
        self.num_sums = num_sums
        self._count, self._totals, self._moments = 0, np.zeros(num_sums), np.zeros((num_sums, num_sums))
        self._keys, self._sums = np.empty(0, np.int64), np.zeros((num_sums, 0))
        self._products: Array | None = None

    def add(self, sums_SB: Array, cluster_B: ArrayLike | None = None) -> None:
        """Take in rows; those without a cluster are one each."""
        if cluster_B is None:
            self._count += sums_SB.shape[1]
            self._totals = self._totals + sums_SB.sum(1)
            self._moments = self._moments + sums_SB @ sums_SB.T
        else:
            self._join(check_groups(cluster_B, sums_SB.shape[1], what="clusters"), sums_SB)

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        if other.num_sums != self.num_sums:
            raise ValueError(f"{other.num_sums} sums do not merge with {self.num_sums}")
        self.merge_state(other.state())
        return self

    def state(self) -> State:
        return {
            "count": np.array(self._count),
            "totals": self._totals.copy(),
            "moments": self._moments.copy(),
            "cluster": self._keys.copy(),
            "sums": self._sums.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(len(state["totals"]))
        metric.merge_state(state)
        return metric

    def merge_state(self, state: Mapping[str, Array]) -> None:
        """Take in what the accumulator had seen whose `state()` this is."""
        self._count += int(state["count"])
        self._totals, self._moments = self._totals + state["totals"], self._moments + state["moments"]
        self._join(np.asarray(state["cluster"], np.int64), np.asarray(state["sums"], np.float64))

    @property
    def num_clusters(self) -> int:
        return self._count + len(self._keys)

    def table(self) -> tuple[Array, Array]:
        """Keys, ascending, and sums of the clusters: int64 (C,), float64 (S, C). Rows without a cluster are not among them."""
        return self._keys, self._sums

    def totals(self) -> Array:
        """float64 (S,)."""
        totals: Array = self._totals + self._sums.sum(1)
        return totals

    def interval(self, of: Statistic, level: float = 0.95) -> Interval:
        """Interval of a smooth function of the totals (S, R) -> (R,), by the delta method.

        With g the gradient of `of` at the totals, s_c the sums of cluster c and m their mean:
        var = C / (C - 1) sum_c (g . (s_c - m))^2, bounds by Student's quantile with C - 1 degrees. nan bounds with a single cluster.
        """
        totals = self.totals()
        value = float(of(totals[:, None])[0])
        if self.num_clusters < 2 or not np.isfinite(value):
            return Interval(value, float("nan"), float("nan"), float("nan"), level)
        moments = self._second_moments()
        # A sum that cancels out is as small as can be: what counts is the size of what it is made of.
        size = np.maximum(np.abs(totals), np.sqrt(np.diag(moments)))
        steps = STEP * np.where(size > 0, size, 1.0)
        away = np.concatenate([totals[:, None] + np.diag(steps), totals[:, None] - np.diag(steps)], axis=1)
        up, down = of(away).reshape(2, -1)
        slope = np.nan_to_num((up - down) / (2 * steps))
        spread = moments - np.outer(totals, totals) / self.num_clusters
        variance = slope @ spread @ slope * self.num_clusters / (self.num_clusters - 1)
        return normal_interval(value, max(float(variance), 0.0), level, self.num_clusters - 1)

    def _second_moments(self) -> Array:
        """float64 (S, S); those of the clusters are kept until clusters come in, since several intervals are asked of one table."""
        if self._products is None:
            self._products = self._sums @ self._sums.T
        moments: Array = self._moments + self._products
        return moments

    def _join(self, keys: Array, sums: Array) -> None:
        if len(keys):
            self._keys, place = distinct(np.concatenate([self._keys, keys]))
            both = np.concatenate([self._sums, sums], axis=1)
            self._sums = np.stack([np.bincount(place, row, len(self._keys)) for row in both])
            self._products = None
