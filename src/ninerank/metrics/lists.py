"""Ranked lists: NDCG, reciprocal rank, average precision and hit rate of each group (request, query, user), at a cut k.

Equal scores have no order, so every metric is its expectation over all orders of the ties (McSherry & Najork 2008,
"Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores"): the result does
not depend on the order of the rows, and a model of constant scores gains nothing from the way the log was written.

Shape legend: B rows of one update, N rows in all, G groups. A block is a run of equal scores within a group.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import RowAccumulator
from ninerank.metrics.keys import HALF, group_codes, score_codes
from ninerank.metrics.rows import Array, Rows

__all__ = ["MAP", "MRR", "NDCG", "HitRate", "ListTable", "average_precision", "hit_rate", "ndcg", "reciprocal_rank"]


class ListTable(NamedTuple):
    """One row a group with a positive: int64 (G,) keys ascending, float64 (G,) weight of the group, float64 (G,) metric."""

    group_G: Array
    weight_G: Array
    value_G: Array


@dataclass(frozen=True)
class _Lists:
    """Rows sorted by group, then by descending score.

    gain_N: label. place_N: 0-based place in the list. first_N, size_N: place of the first row of the block, and its rows.
    block_gain_N: sum of the gains of the row's block. before_N: sum of the gains above the block. start_G: first row of each group.
    """

    gain_N: Array
    place_N: Array
    first_N: Array
    size_N: Array
    block_gain_N: Array
    before_N: Array
    start_G: Array
    weight_G: Array
    key_G: Array

    def sums(self, values_N: Array) -> Array:
        """float64 (G,): sum over each group."""
        return np.add.reduceat(values_N, self.start_G)

    @classmethod
    def of(cls, rows: Rows, group_N: Array) -> "_Lists":
        code_N, keys = group_codes(group_N)
        key_N = (code_N << HALF) | (np.uint64(0xFFFFFFFF) - score_codes(rows.score_B))
        order = np.argsort(key_N)
        key_N, gain_N = key_N[order], rows.label_B[order].astype(np.float64)
        start_G, group_of_N = _runs(key_N >> HALF)
        start_K, block_of_N = _runs(key_N)
        size_K, size_G = np.diff(np.append(start_K, len(order))), np.diff(np.append(start_G, len(order)))
        gain_K = np.add.reduceat(gain_N, start_K)
        above_K = np.cumsum(gain_K) - gain_K
        group_of_K = group_of_N[start_K]
        before_K = above_K - above_K[np.searchsorted(start_K, start_G)][group_of_K]
        weight_G = np.ones(len(start_G)) if rows.weight_B is None else np.add.reduceat(rows.weight_B[order], start_G) / size_G
        return cls(
            gain_N=gain_N,
            place_N=np.arange(len(order)) - start_G[group_of_N],
            first_N=(start_K - start_G[group_of_K])[block_of_N],
            size_N=size_K[block_of_N],
            block_gain_N=gain_K[block_of_N],
            before_N=before_K[block_of_N],
            start_G=start_G,
            weight_G=weight_G,
            key_G=keys((key_N >> HALF)[start_G]),
        )


class ListMetric(RowAccumulator):
    """Base of the metrics of ranked lists: mean over the groups with a positive, each counted once, or by its rows' mean weight.

    k: only the first k places count; None for all. nan where no group has a positive.
    Raises DataError for rows that `check_rows` refuses and for rows without groups, ValueError for a k below 1.
    """

    grouped = True

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        if k is not None and k < 1:
            raise ValueError(f"k is {k}, at least 1 is needed")
        self.k = k

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None, group_B: ArrayLike | None = None) -> Self:
        if group_B is None:
            raise DataError(f"{type(self).__name__} has no groups: group_B is needed, one integer key per row")
        self._append(label_B, score_B, weight_B, group_B)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        if other.k != self.k:
            raise ValueError(f"{type(self).__name__} at k={other.k} does not merge with k={self.k}")
        return super().merge(other)

    def value(self) -> float:
        table = self.groups()
        total = table.weight_G.sum()
        return float((table.weight_G * table.value_G).sum() / total) if total > 0 else float("nan")

    def groups(self) -> ListTable:
        """The metric of each group that has a positive, by ascending key."""
        rows = self._rows()
        if not len(rows):
            return ListTable(np.empty(0, np.int64), np.empty(0), np.empty(0))
        lists = _Lists.of(rows, self._column("group"))
        with_gain_G = lists.sums(lists.gain_N) > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            value_G = self._values(lists, len(rows) if self.k is None else self.k)
        return ListTable(lists.key_G[with_gain_G], lists.weight_G[with_gain_G], value_G[with_gain_G])

    def state(self) -> dict[str, Array]:
        return {**super().state(), "k": np.array(self.k or 0)}

    @classmethod
    def from_state(cls, state: "dict[str, Array]") -> Self:  # type: ignore[override]
        metric = cls(int(state["k"]) or None)
        metric._append(state["label"], state["score"], state.get("weight"), state["group"])
        return metric

    @abstractmethod
    def _values(self, lists: _Lists, k: int) -> Array:
        """float64 (G,); whatever for groups without a positive."""


class NDCG(ListMetric):
    """Normalised discounted cumulative gain (Järvelin & Kekäläinen 2002), labels being gains, 0 or more.

    DCG@k = sum_{place r = 1..k} gain_r / log2(r + 1), divided by the DCG@k of the best order. For exponential gains
    give 2**grade - 1 as the label.

    >>> round(NDCG().update([0, 1, 1], [0.9, 0.8, 0.1], group_B=[7, 7, 7]).value(), 4)
    0.6934
    """

    graded = True

    def _values(self, lists: _Lists, k: int) -> Array:
        discount_N = np.where(lists.place_N < k, 1 / np.log2(lists.place_N + 2.0), 0.0)
        found_G = lists.sums(discount_N * lists.block_gain_N / lists.size_N)
        # The places of a group are in ascending order already, so that the best order only sorts the gains within groups.
        code_N = np.repeat(np.arange(len(lists.start_G)), np.diff(np.append(lists.start_G, len(lists.gain_N))))
        best_N = lists.gain_N[np.lexsort((-lists.gain_N, code_N))]
        return found_G / lists.sums(discount_N * best_N)


class MRR(ListMetric):
    """Mean reciprocal rank: 1 / (place of the first positive), 0 where it lies beyond k (Voorhees 1999).

    >>> MRR().update([0, 1, 1], [0.9, 0.8, 0.1], group_B=[7, 7, 7]).value()
    0.5
    """

    def _values(self, lists: _Lists, k: int) -> Array:
        return lists.sums(np.where(lists.place_N < k, _first_positive(lists) / (lists.place_N + 1.0), 0.0))


class MAP(ListMetric):
    """Mean average precision: mean over the positives of the precision at their place; at k, over min(positives, k) of them.

    >>> round(MAP().update([0, 1, 1], [0.9, 0.8, 0.1], group_B=[7, 7, 7]).value(), 4)
    0.5833
    """

    def _values(self, lists: _Lists, k: int) -> Array:
        # The row at step j of its block is positive with chance m / n; given that, (m - 1) / (n - 1) of the j rows above are.
        step_N, chance_N = lists.place_N - lists.first_N, lists.block_gain_N / lists.size_N
        others_N = np.where(lists.size_N > 1, (lists.block_gain_N - 1) / np.maximum(lists.size_N - 1, 1), 0.0)
        precision_N = (lists.before_N + step_N * others_N + 1) / (lists.place_N + 1.0)
        found_G = lists.sums(np.where(lists.place_N < k, chance_N * precision_N, 0.0))
        return found_G / np.minimum(lists.sums(lists.gain_N), k)


class HitRate(ListMetric):
    """Share of groups with a positive among the first k.

    >>> HitRate(1).update([0, 1, 1], [0.9, 0.8, 0.1], group_B=[7, 7, 7]).value()
    0.0
    """

    def _values(self, lists: _Lists, k: int) -> Array:
        return np.minimum(lists.sums(np.where(lists.place_N < k, _first_positive(lists), 0.0)), 1.0)


def ndcg(label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, group_N: ArrayLike, k: int | None = None) -> float:
    """`NDCG` of all rows at once."""
    return NDCG(k).update(label_N, score_N, weight_N, group_N).value()


def reciprocal_rank(
    label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, group_N: ArrayLike, k: int | None = None
) -> float:
    """`MRR` of all rows at once."""
    return MRR(k).update(label_N, score_N, weight_N, group_N).value()


def average_precision(
    label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, group_N: ArrayLike, k: int | None = None
) -> float:
    """`MAP` of all rows at once."""
    return MAP(k).update(label_N, score_N, weight_N, group_N).value()


def hit_rate(
    label_N: ArrayLike, score_N: ArrayLike, weight_N: ArrayLike | None = None, *, group_N: ArrayLike, k: int | None = None
) -> float:
    """`HitRate` of all rows at once."""
    return HitRate(k).update(label_N, score_N, weight_N, group_N).value()


def _first_positive(lists: _Lists) -> Array:
    """float64 (N,): chance that the first positive of the group stands at this row's place.

    Within the first block that has positives, m of its n rows, the place j = 0, 1, .. is the first positive's with
    chance C(n - 1 - j, m - 1) / C(n, m).
    """
    step_N, size_N, positives_N = lists.place_N - lists.first_N, lists.size_N, lists.block_gain_N.astype(np.int64)
    able_N = (lists.before_N == 0) & (positives_N > 0) & (size_N - step_N >= positives_N)
    j, n, m = step_N[able_N], size_N[able_N], positives_N[able_N]
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, size_N.max() + 1)))])
    logs = log_factorial[n - 1 - j] - log_factorial[n - m - j] + log_factorial[n - m] - log_factorial[n] + np.log(m)
    chance_N = np.zeros(len(step_N))
    chance_N[able_N] = np.exp(logs)
    return chance_N


def _runs(sorted_N: Array) -> tuple[Array, Array]:
    """Where each run of equal values starts, and the number of each value's run."""
    is_first_N = np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]])
    return np.flatnonzero(is_first_N), np.cumsum(is_first_N) - 1
