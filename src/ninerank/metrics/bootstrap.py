"""Cluster bootstrap: how a metric would vary had other users (or requests) come, by resampling them whole.

In each replicate a cluster counts Poisson(1) times (Chamandy et al. 2012, "Estimating Uncertainty for Massive Data
Streams"). Its number is drawn from a hash of its key, the replicate and the seed, so every shard gives the rows of one
cluster the same number: shards work alone, and their sums add up to those of the whole.

Shape legend: B rows of one update, N rows in all, C clusters, R replicates, S sums.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.metrics.accumulator import Accumulator, State, SumAccumulator
from ninerank.metrics.clusters import ClusterSums
from ninerank.metrics.delta import metric_named
from ninerank.metrics.intervals import Interval, check_level
from ninerank.metrics.keys import distinct
from ninerank.metrics.rows import Array, check_groups, check_rows

__all__ = ["Bootstrap", "auc_bootstrap", "bootstrap", "hash_keys", "poisson_weights"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LANES = 4
CLUSTERS_AT_A_TIME = 4096
MOST_WAITING = 1 << 20


def _poisson_table() -> Array:
    """uint8 (65536,): Poisson(1) counts as often as their chance says, to 1 / 65536."""
    chance = np.array([math.exp(-1) / math.factorial(k) for k in range(9)])
    ends = np.rint(np.cumsum(chance) * 65536).astype(np.int64)
    table = np.searchsorted(ends, np.arange(65536), "right").astype(np.uint8)
    assert int(table.sum()) == 65536, "the mean is 1 exactly"
    return table


POISSON = _poisson_table()


def poisson_weights(key_C: ArrayLike, num_replicates: int, seed: int = 0) -> Array:
    """float64 (C, R): how often each cluster counts in each replicate; the same for a key wherever it is asked."""
    words = np.arange(-(-num_replicates // LANES))
    counts: Array = _draw(np.asarray(key_C, np.int64), words, seed)[:, :num_replicates].astype(np.float64)
    return counts


class Bootstrap(Accumulator):
    """A metric made of sums with its bootstrap percentile interval; of A minus B where `update` gets the scores of two.

    R + 1 vectors of sums are held, and the sums of up to a million clusters that are still to be resampled, so that one
    whose rows come in many updates is drawn once. Rows without clusters cannot be resampled alike by different shards; give
    a row number or request id as the cluster.

    >>> from ninerank.metrics import PCOC
    >>> found = Bootstrap(PCOC, 200).update([1, 0] * 50, [0.75, 0.25] * 50, cluster_B=range(100)).value()
    >>> found.value, 0.7 < found.low < 1 < found.high < 1.4
    (1.0, True)
    """

    def __init__(self, metric: type[SumAccumulator], num_replicates: int = 1000, *, seed: int = 0, level: float = 0.95) -> None:
        if num_replicates < 2:
            raise ValueError(f"num_replicates is {num_replicates}, at least 2 are needed, 1000 for 95% intervals")
        self.metric, self.num_replicates, self.seed, self.level = metric, num_replicates, seed, check_level(level)
        # Sums of A, then of B; column 0 counts each cluster once.
        self._sums = np.zeros((2 * metric.num_sums, num_replicates + 1))
        self._paired: bool | None = None  # not known before the first rows
        self._waiting = ClusterSums(len(self._sums))

    def update(
        self,
        label_B: ArrayLike,
        score_B: ArrayLike,
        weight_B: ArrayLike | None = None,
        *,
        cluster_B: ArrayLike,
        other_B: ArrayLike | None = None,
    ) -> Self:
        """other_B: scores of B on the same rows, for the difference A - B."""
        self._check_paired(other_B is not None)
        rows = [
            check_rows(label_B, score, weight_B, probability=self.metric.probability) for score in (score_B, other_B) if score is not None
        ]
        terms = np.zeros((len(self._sums), len(rows[0])))
        for number, own in enumerate(rows):
            terms[number * self.metric.num_sums : (number + 1) * self.metric.num_sums] = self.metric.terms(own)
        self._waiting.add(terms, cluster_B)
        self._paired = other_B is not None
        if self._waiting.num_clusters > MOST_WAITING:
            self._resample()
        return self

    def _resample(self) -> None:
        """Take in the clusters that wait."""
        key_C, sums_SC = self._waiting.table()
        self._sums = self._sums + _resampled(key_C, sums_SC, self.num_replicates, self.seed)
        self._waiting = ClusterSums(len(self._sums))

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        mine, theirs = ((m.metric.__name__, m.num_replicates, m.seed) for m in (self, other))
        if mine != theirs:
            raise ValueError(f"a bootstrap of (metric, replicates, seed) {theirs} does not merge with {mine}")
        if other._paired is not None:
            self._check_paired(other._paired)
            self._paired = other._paired
        self._sums = self._sums + other._sums
        self._waiting.merge(other._waiting)
        return self

    def value(self) -> Interval:
        self._resample()
        half = self.metric.num_sums
        found = self.metric.of(self._sums[:half])
        if self._paired:
            found = found - self.metric.of(self._sums[half:])
        return percentile_interval(float(found[0]), found[1:], self.level)

    def state(self) -> State:
        self._resample()
        return {
            "sums": self._sums.copy(),
            "seed": np.array(self.seed),
            "level": np.array(self.level),
            "paired": np.array(-1 if self._paired is None else int(self._paired)),
            "metric": np.array(self.metric.__name__),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls(metric_named(str(state["metric"])), state["sums"].shape[1] - 1, seed=int(state["seed"]), level=float(state["level"]))
        metric._sums, paired = np.array(state["sums"], np.float64), int(state["paired"])
        metric._paired = None if paired < 0 else bool(paired)
        return metric

    def _check_paired(self, paired: bool) -> None:
        if self._paired not in (None, paired):
            raise ValueError("some rows have scores of two models and some of one: all or none are needed")


def bootstrap(
    statistic: Callable[[Array], Array],
    sums_SN: ArrayLike,
    *,
    cluster_N: ArrayLike,
    num_replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of any function (S, R) -> (R,) of sums over the rows, clusters resampled."""
    sums = np.atleast_2d(np.asarray(sums_SN, np.float64))
    key_C, place_N = distinct(check_groups(cluster_N, sums.shape[1], what="clusters"))
    sums_SC = np.stack([np.bincount(place_N, row, len(key_C)) for row in sums])
    found = statistic(_resampled(key_C, sums_SC, num_replicates, seed))
    return percentile_interval(float(found[0]), found[1:], level)


def auc_bootstrap(
    label_N: ArrayLike,
    score_N: ArrayLike,
    weight_N: ArrayLike | None = None,
    *,
    cluster_N: ArrayLike,
    other_N: ArrayLike | None = None,
    num_replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """AUC, or that of A minus that of B (`other_N`), with its bootstrap percentile interval, clusters resampled.

    Rows are sorted once and each replicate costs one pass over them. `AUCInterval` gives about the same in one.
    """
    both = [check_rows(label_N, score, weight_N) for score in (score_N, other_N) if score is not None]
    key_C, place_N = distinct(check_groups(cluster_N, len(both[0]), what="clusters"))
    sorted_rows = []
    for rows in both:
        order = np.argsort(rows.score_B)
        ascending = rows.score_B[order]
        start_K = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]])) if len(rows) else np.empty(0, np.int64)
        weight = np.ones(len(rows)) if rows.weight_B is None else rows.weight_B[order]
        sorted_rows.append((place_N[order], rows.label_B[order], weight, start_K))
    found = np.empty(num_replicates + 1)
    for r in range(num_replicates + 1):
        count_C = np.ones(len(key_C)) if r == 0 else _draw(key_C, np.array([(r - 1) // LANES]), seed)[:, (r - 1) % LANES].astype(np.float64)
        areas = [_area(count_C[place], label, weight, start) for place, label, weight, start in sorted_rows]
        found[r] = areas[0] - (areas[1] if len(areas) > 1 else 0.0)
    return percentile_interval(float(found[0]), found[1:], level)


def percentile_interval(value: float, resampled_R: Array, level: float) -> Interval:
    """Interval between the percentiles of the replicates that have a value; nan bounds where fewer than half have one."""
    finite = resampled_R[np.isfinite(resampled_R)]
    if len(finite) * 2 < len(resampled_R) or len(finite) < 2:
        return Interval(value, float("nan"), float("nan"), float("nan"), level)
    low, high = np.quantile(finite, [(1 - check_level(level)) / 2, (1 + level) / 2]).tolist()
    return Interval(value, low, high, float(finite.std(ddof=1)), level)


def _resampled(key_C: Array, sums_SC: Array, num_replicates: int, seed: int) -> Array:
    """float64 (S, R + 1): sums over the clusters, each once, then over those of each replicate.

    Not by a matrix product: BLAS wakes its threads for so thin a one, which costs more than it saves on a busy machine.
    """
    found = np.zeros((len(sums_SC), num_replicates + 1))
    found[:, 0] = sums_SC.sum(1)
    for start in range(0, len(key_C), CLUSTERS_AT_A_TIME):
        own = slice(start, start + CLUSTERS_AT_A_TIME)
        weights_CR = poisson_weights(key_C[own], num_replicates, seed)
        for number, sums_C in enumerate(sums_SC[:, own]):
            if sums_C.any():
                found[number, 1:] += np.einsum("c,cr->r", sums_C, weights_CR)
    return found


def hash_keys(key_C: ArrayLike, seed: int) -> Array:
    """uint64 (C,): a hash of each integer key, the same wherever it is asked."""
    return _mix(np.asarray(key_C, np.int64).view(np.uint64) ^ _mix(np.array([seed], np.int64).view(np.uint64)))


def _draw(key_C: Array, word_W: Array, seed: int) -> Array:
    """uint8 (C, 4 W): counts of the replicates 4 w, .., 4 w + 3 of each word w: each hash holds four of 16 bits."""
    hash_CW = _mix(hash_keys(key_C, seed)[:, None] + GOLDEN * (word_W + 1).astype(np.uint64))
    counts: Array = POISSON[hash_CW.astype("<u8").view("<u2")]
    return counts


def _area(count_N: Array, label_N: Array, weight_N: Array, start_K: Array) -> float:
    """Weighted AUC of rows in ascending order of their scores; start_K: first row of each run of equal scores."""
    mass_N = count_N * weight_N
    if not len(mass_N):
        return float("nan")
    positive_K, all_K = np.add.reduceat(mass_N * label_N, start_K), np.add.reduceat(mass_N, start_K)
    negative_K = all_K - positive_K
    pairs = positive_K.sum() * negative_K.sum()
    return float(positive_K @ (np.cumsum(negative_K) - negative_K / 2) / pairs) if pairs > 0 else float("nan")


def _mix(word: Array) -> Array:
    """Finaliser of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of the word."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = word ^ (word >> np.uint64(31))
    return mixed
