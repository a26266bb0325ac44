"""What every metric can do: take rows in any number of updates, merge with another of its kind, travel as plain arrays.

`a.merge(b)` leaves in `a` what one accumulator would hold that had seen the rows of both, so that workers, ranks and
shards count alone and are joined at the end. `state()` holds NumPy arrays only (for np.savez, a collective, Ray).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.metrics.rows import Array, Rows, check_groups, check_rows

__all__ = ["Accumulator", "RowAccumulator", "State", "SumAccumulator", "ratio", "under"]

State = dict[str, Array]


class Accumulator(ABC):
    """Base of all metrics that merge."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Take in all that `other` has seen; `other` stays as it is. Returns self."""

    @abstractmethod
    def state(self) -> State:
        """Everything the accumulator holds, as arrays."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        """The accumulator whose `state()` this is."""

    def _refuse_other(self, other: object) -> None:
        if type(other) is not type(self):
            raise TypeError(f"{type(self).__name__} merges with its own kind, not with {type(other).__name__}")


class SumAccumulator(Accumulator):
    """A function of a few weighted sums over the rows, so that merging is adding.

    What makes one is `terms`, each row's share of the sums, and `of`, the metric of given sums: whole, of a slice, or of
    the many resamplings of a bootstrap at once.
    """

    num_sums: int
    probability = True

    def __init__(self) -> None:
        self._sums = np.zeros(self.num_sums)

    @classmethod
    @abstractmethod
    def terms(cls, rows: Rows) -> Array:
        """float64 (num_sums, B): what each row adds, its weight included."""

    @classmethod
    @abstractmethod
    def of(cls, sums_SR: Array) -> Array:
        """float64 (R,): the metric of each column of sums; nan where it has no value."""

    def update(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None = None) -> Self:
        self._sums += self.terms(check_rows(label_B, score_B, weight_B, probability=self.probability)).sum(1)
        return self

    def value(self) -> float:
        return float(self.of(self._sums[:, None])[0])

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._sums = self._sums + other._sums
        return self

    def state(self) -> State:
        return {"sums": self._sums.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls()
        metric._sums = np.array(state["sums"], np.float64).reshape(cls.num_sums)
        return metric


class RowAccumulator(Accumulator):
    """Holds every row: 5 bytes with float32 scores, 8 more with weights, 8 more with groups."""

    grouped = False
    graded = False

    def __init__(self) -> None:
        self._chunks: list[State] = []
        self._weighted = False

    @property
    def num_rows(self) -> int:
        return sum(len(chunk["label"]) for chunk in self._chunks)

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        self._chunks = [*self._chunks, *other._chunks]
        self._weighted = self._weighted or other._weighted
        return self

    def state(self) -> State:
        names = ("label", "score", *(("weight",) if self._weighted else ()), *(("group",) if self.grouped else ()))
        return {name: self._column(name) for name in names}

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        metric = cls()
        metric._append(state["label"], state["score"], state.get("weight"), state.get("group"))
        return metric

    def _append(self, label_B: ArrayLike, score_B: ArrayLike, weight_B: ArrayLike | None, group_B: ArrayLike | None = None) -> None:
        rows = check_rows(label_B, score_B, weight_B, graded=self.graded)
        self._weighted = self._weighted or rows.weight_B is not None
        # A broadcast 1 takes no memory until a weighted chunk comes beside it.
        weights = np.broadcast_to(np.float64(1), len(rows)) if rows.weight_B is None else rows.weight_B
        chunk = {"label": rows.label_B.copy(), "score": rows.score_B, "weight": weights}
        if group_B is not None:
            chunk["group"] = check_groups(group_B, len(rows))
        if len(rows):
            self._chunks.append(chunk)

    def _rows(self) -> Rows:
        return Rows(self._column("label"), self._column("score"), self._column("weight") if self._weighted else None)

    def _column(self, name: str) -> Array:
        if not self._chunks:
            return np.empty(0, {"label": np.float64 if self.graded else np.bool_, "group": np.int64}.get(name, np.float64))
        return np.concatenate([chunk[name] for chunk in self._chunks])


def ratio(above: Array, below: Array) -> Array:
    """above / below, nan where below is not positive."""
    quotient: Array = np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below > 0)
    return quotient


def under(state: Mapping[str, Array], prefix: str) -> State:
    """The columns of a state whose names begin with `prefix`, without it: the state of a part."""
    return {key.removeprefix(prefix): column for key, column in state.items() if key.startswith(prefix)}
