"""What a model shows of the catalogue: coverage, concentration, novelty.

Shape legend: B rows of one update, I distinct items.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import Accumulator, State
from ninerank.metrics.keys import HALF, group_codes, score_codes
from ninerank.metrics.rows import Array, check_groups, check_rows

__all__ = ["ItemCounts", "coverage", "novelty", "top_k"]


class ItemCounts(Accumulator):
    """How often each item was shown (or clicked), and what follows from it. Items are integer ids.

    Raises DataError for ids that are no integers.

    >>> shown = ItemCounts().update([1, 1, 2]).merge(ItemCounts().update([2]))
    >>> shown.coverage(8), shown.novelty(ItemCounts().update([1, 2, 2, 3])), shown.gini(2)
    (0.25, 1.5, 0.0)
    """

    def __init__(self) -> None:
        self._items, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)

    def update(self, item_B: ArrayLike) -> Self:
        items = np.asarray(item_B)
        distinct, counts = np.unique(check_groups(items, len(items) if items.ndim else 0, what="items"), return_counts=True)
        self._add(distinct, counts)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._add(other._items, other._counts)
        return self

    def state(self) -> State:
        return {"item": self._items.copy(), "count": self._counts.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        counts = cls()
        counts._add(np.asarray(state["item"], np.int64), np.asarray(state["count"], np.int64))
        return counts

    def value(self) -> dict[int, int]:
        """Count of each item, by ascending id."""
        return dict(zip(self._items.tolist(), self._counts.tolist(), strict=True))

    def coverage(self, num_items: int) -> float:
        """Share of a catalogue of `num_items` that was shown at all. Raises DataError if more items were shown than that."""
        self._check_catalogue(num_items)
        return len(self._items) / num_items

    def gini(self, num_items: int) -> float:
        """Gini coefficient of the impressions: 0 if the whole catalogue is shown alike, near 1 if few items have all. nan without rows."""
        self._check_catalogue(num_items)
        total = int(self._counts.sum())
        if not total:
            return float("nan")
        ascending = np.sort(self._counts)
        place = np.arange(num_items - len(ascending) + 1, num_items + 1)  # items never shown come first
        return float(((2 * place - num_items - 1) * ascending).sum() / (num_items * total))

    def novelty(self, popularity: "ItemCounts") -> float:
        """Mean self-information of what was shown, in bits: mean of -log2 p(item), p its share in `popularity` (Zhou et al. 2010).

        An item that `popularity` has not seen counts as seen once, so that its novelty is large and finite. nan without rows.
        """
        total = int(popularity._counts.sum())
        if not len(self._items) or not total:
            return float("nan")
        place = np.minimum(np.searchsorted(popularity._items, self._items), len(popularity._items) - 1)
        seen = np.where(popularity._items[place] == self._items, popularity._counts[place], 1)
        return float(np.average(-np.log2(seen / total), weights=self._counts))

    def _add(self, items: Array, counts: Array) -> None:
        both, place = np.unique(np.concatenate([self._items, items]), return_inverse=True)
        joined = np.zeros(len(both), np.int64)
        np.add.at(joined, place, np.concatenate([self._counts, counts]))
        self._items, self._counts = both, joined

    def _check_catalogue(self, num_items: int) -> None:
        if num_items < max(1, len(self._items)):
            raise DataError(f"a catalogue of {num_items} items, and {len(self._items)} different ones were shown: it must hold them all")


def top_k(score_N: ArrayLike, group_N: ArrayLike, k: int) -> Array:
    """bool (N,): the rows that a list of the k best scores of each group would show; ties go to the earlier row.

    >>> top_k([0.1, 0.9, 0.5, 0.3], [1, 1, 1, 2], 2).tolist()
    [False, True, True, True]
    """
    rows = check_rows(np.zeros(len(np.asarray(score_N)), bool), score_N)
    code_N, _ = group_codes(check_groups(group_N, len(rows)))
    key_N = (code_N << HALF) | (np.uint64(0xFFFFFFFF) - score_codes(rows.score_B))
    order = np.argsort(key_N, kind="stable")
    sorted_N = code_N[order]
    chosen = np.zeros(len(rows), bool)
    chosen[order] = np.arange(len(rows)) - np.searchsorted(sorted_N, sorted_N) < k
    return chosen


def coverage(item_N: ArrayLike, num_items: int) -> float:
    """Share of a catalogue of `num_items` that occurs in `item_N`."""
    return ItemCounts().update(item_N).coverage(num_items)


def novelty(item_N: ArrayLike, popular_N: ArrayLike) -> float:
    """`ItemCounts.novelty` of the items shown, by the shares of those in `popular_N`."""
    return ItemCounts().update(item_N).novelty(ItemCounts().update(popular_N))
