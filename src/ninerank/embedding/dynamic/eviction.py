"""Which rows are given up: those not seen for long, those seldom seen, and whatever is beyond the table's capacity.

Ages are in the units of the table's clock, steps or seconds. Choices depend on ids, counts and last-seen values alone, ties going to
the smaller id, so that they are the same wherever the rows happen to lie.
"""

from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ninerank.config import Config

__all__ = ["Alone", "Capacity", "EvictionConfig", "LastSeen", "LeastFrequent", "Sharers", "chosen", "smallest"]

Keys = npt.NDArray[np.number[Any]]


class LastSeen(Config):
    """Gives up rows that were not looked up in training for more than `max_age` steps or seconds."""

    kind: Literal["last_seen"] = "last_seen"
    max_age: int = Field(ge=0)


class LeastFrequent(Config):
    """Gives up rows looked up fewer than `min_count` times in training since they were admitted, once unseen for more than `max_age`."""

    kind: Literal["least_frequent"] = "least_frequent"
    min_count: int = Field(ge=2)
    max_age: int = Field(default=0, ge=0)


class Capacity(Config):
    """Keeps at most `max_rows`: beyond it, rows are given up until `fill * max_rows` remain.

    Of a table over several processes the rows of all are counted. by: `lru` gives up the rows longest unseen (of these the least
    counted), `lfu` the least counted (of these the longest unseen). `fill` below 1 spreads the cost of choosing over many steps.
    """

    kind: Literal["capacity"] = "capacity"
    max_rows: int = Field(ge=1)
    by: Literal["lru", "lfu"] = "lru"
    fill: float = Field(default=0.9375, gt=0.0, le=1.0)

    @property
    def rows_kept(self) -> int:
        return max(1, int(self.max_rows * self.fill))


EvictionConfig = Annotated[LastSeen | LeastFrequent | Capacity, Field(discriminator="kind")]


class Sharers(Protocol):
    """Those that hold the rows of one table, each its own. What is asked of one is asked of all at the same moment."""

    def total(self, own_rows: int) -> int:
        """Rows of all."""

    def smallest(self, count: int, *keys: Keys) -> npt.NDArray[np.int64]:
        """Positions of those of the own entries that are among the `count` smallest of all, by keys as `smallest` takes them."""


class Alone:
    """The holder of a whole table."""

    def total(self, own_rows: int) -> int:
        return own_rows

    def smallest(self, count: int, *keys: Keys) -> npt.NDArray[np.int64]:
        return smallest(count, *keys)


def chosen(policy: EvictionConfig, book: npt.NDArray[Any], tick: int, sharers: Sharers) -> npt.NDArray[np.int64]:
    """Rows to give up by a policy, of those whose records (`storage.BOOK`) `book` has; tick: the step or time that ages run to."""
    if not isinstance(policy, Capacity):
        old = (book["count"] > 0) & (book["last_seen"] < tick - policy.max_age)
        return np.flatnonzero(old if isinstance(policy, LastSeen) else old & (book["count"] < policy.min_count))
    rows = np.flatnonzero(book["count"])
    size = sharers.total(len(rows))
    if size <= policy.max_rows:
        return np.empty(0, np.int64)
    order = ("last_seen", "count") if policy.by == "lru" else ("count", "last_seen")
    return rows[sharers.smallest(size - policy.rows_kept, *(book[key][rows] for key in (*order, "id")))]


def smallest(count: int, *keys: Keys) -> npt.NDArray[np.int64]:
    """Positions of the `count` smallest entries by the first key, ties by the next one, and so on; O(n) a key, in no order.

    >>> sorted(smallest(2, np.array([3, 1, 1, 1]), np.array([0, 9, 7, 8])).tolist())
    [2, 3]
    """
    first, *rest = keys
    if count <= 0:
        return np.empty(0, np.int64)
    if count >= len(first):
        return np.arange(len(first))
    bound = np.partition(first, count - 1)[count - 1]
    below, tied = np.flatnonzero(first < bound), np.flatnonzero(first == bound)
    open_places = count - len(below)
    chosen = tied[smallest(open_places, *(key[tied] for key in rest))] if rest else tied[:open_places]
    return np.concatenate([below, chosen])
