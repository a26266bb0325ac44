"""Rows of a dynamic table: values and optimizer state of every group, and the book kept of each row.

Row r means the same id in every group. Row 0 is the default row, all zeros, that ids without a row read; it is never updated.
Rows that are given up go to a free list and are the first to be given out again.

Bytes per row: 24 for the book, plus 4 (D + W) per group of dim D with W numbers of optimizer state.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ninerank.embedding.changes import Column, RowBlock, column_of
from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.dynamic.initial import fill_rows, initial_key
from ninerank.embedding.dynamic.native import AHEAD, prefetch
from ninerank.embedding.dynamic.reserve import RowArray
from ninerank.embedding.dynamic.rules import FusedRule
from ninerank.features.native import jit

__all__ = ["BOOK", "RowStorage"]

# count: lookups in training since the row was given to the id, 0 for a free row. version: the table's version when the row last changed.
BOOK = np.dtype([("id", np.int64), ("last_seen", np.int64), ("count", np.uint32), ("version", np.uint32)])
GREATEST_COUNT = np.uint32(0xFFFFFFFF)
BOOK_WORDS = BOOK.itemsize // 8


@jit
def _enter(book, rows, ids, now):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        entry = book[rows[i]]
        entry.id, entry.last_seen, entry.count = ids[i], now, 0


@jit
def _touch(book, words, rows, now, version):  # type: ignore[no-untyped-def]
    """Note one occurrence of each row in `rows`; row 0 stands for ids without one."""
    count = rows.shape[0]
    for i in range(count):
        if i + AHEAD < count:
            prefetch(words, rows[i + AHEAD] * BOOK_WORDS)
        if rows[i] == 0:
            continue
        entry = book[rows[i]]
        if entry.count < GREATEST_COUNT:
            entry.count += np.uint32(1)
        entry.last_seen = max(entry.last_seen, now)
        entry.version = version


@jit
def _mark(book, rows, version):  # type: ignore[no-untyped-def]
    for i in range(rows.shape[0]):
        book[rows[i]].version = version


def _place(rows: Ints) -> Ints | slice:
    """Index of rows: a slice where they follow each other, as those of a growing table do, so that NumPy copies nothing to read them."""
    is_run = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if is_run else rows


class RowStorage:
    """Arrays of one table, addressed by row."""

    def __init__(self, table: str, dims: Mapping[str, int], rule: FusedRule | None, *, std: float, seed: int, rows: int) -> None:
        self.used = 1
        self.free, self.num_free = np.empty(0, np.int64), 0
        self._rule, self._std = rule, np.float32(std)
        self._keys = {group: initial_key(seed, group, table) for group in dims}
        self._book = RowArray(rows, 0, BOOK)
        self._values = {group: RowArray(rows, dim, np.float32) for group, dim in dims.items()}
        self._states = {
            group: {name: RowArray(rows, column.width, column.dtype) for name, column in self._state_columns(dim).items()}
            for group, dim in dims.items()
        }

    def _state_columns(self, dim: int) -> dict[str, Column]:
        states = self._rule.new_state(torch.empty(0, dim)) if self._rule is not None else {}
        return {name: column_of(state.numpy()) for name, state in states.items()}

    @property
    def book(self) -> npt.NDArray[Any]:
        """Records (used,) of dtype BOOK."""
        return self._book.rows[: self.used]

    def values(self, group: str) -> Tensor:
        """float32 (used, D), a view until rows are added."""
        return torch.from_numpy(self._values[group].rows[: self.used])

    def states(self, group: str) -> dict[str, Tensor]:
        """Name -> (used,) or (used, W), views until rows are added."""
        return {name: torch.from_numpy(array.rows[: self.used]) for name, array in self._states[group].items()}

    @property
    def row_bytes(self) -> int:
        return sum(array.row_bytes for array in self._all())

    @property
    def num_rows(self) -> int:
        """Rows there is address space for."""
        return min(array.num_rows for array in self._all())

    def ensure(self, num_rows: int) -> None:
        """Have address space for `num_rows`."""
        for array in self._all():
            array.ensure(num_rows, self.used)

    def enter(self, rows: Ints, ids: Ints, now: int) -> None:
        """Note which ids rows belong to, as yet without values."""
        _enter(self._book.rows, rows, ids, now)

    def open(self, rows: Ints, ids: Ints, now: int) -> None:
        """Give rows to ids: first values and fresh optimizer state."""
        self.enter(rows, ids, now)
        for group, array in self._values.items():
            fill_rows(array.rows, rows, ids, self._keys[group], self._std)
            if self._states[group] and self._rule is not None:
                where = _place(rows)
                for name, state in self._rule.new_state(torch.from_numpy(array.rows[where])).items():
                    self._states[group][name].rows[where] = state.numpy()

    def touch(self, rows: Ints, now: int, version: int) -> None:
        """Note one occurrence in training of each row in `rows`."""
        book = self._book.rows
        _touch(book, book.view(np.int64), rows, now, np.uint32(version))

    def mark(self, rows: Ints, version: int) -> None:
        """Note that rows changed."""
        _mark(self._book.rows, rows, np.uint32(version))

    def close(self, rows: Ints) -> None:
        """Take rows from their ids."""
        self._book.rows["count"][rows] = 0
        if self.num_free + len(rows) > len(self.free):
            grown = np.empty(max(2 * len(self.free), self.num_free + len(rows)), np.int64)
            grown[: self.num_free] = self.free[: self.num_free]
            self.free = grown
        self.free[self.num_free : self.num_free + len(rows)] = rows
        self.num_free += len(rows)

    def live(self) -> Ints:
        """Rows that belong to an id."""
        return np.flatnonzero(self.book["count"])

    def columns(self, *, state: bool) -> dict[str, Column]:
        """Columns that `gather` can give: values of every group; with `state` also optimizer state, last_seen and count."""
        columns = {f"value.{group}": column_of(array.rows) for group, array in self._values.items()}
        if state:
            for group, states in self._states.items():
                columns |= {f"state.{group}.{name}": column_of(array.rows) for name, array in states.items()}
            columns |= {"last_seen": Column("int64", 0), "count": Column("int64", 0)}
        return columns

    def gather(self, rows: Ints, *, state: bool) -> RowBlock:
        """Copies of rows, ids beside their columns."""
        book = self.book[rows]
        columns: dict[str, npt.NDArray[Any]] = {name: array[rows] for name, array in self._named(state=state)}
        if state:
            columns |= {"last_seen": book["last_seen"].copy(), "count": book["count"].astype(np.int64)}
        return RowBlock(book["id"].copy(), columns)

    def scatter(self, rows: Ints, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write columns, as `gather` gives them, into rows."""
        for name, array in self._named(state=True):
            if name in columns:
                array[rows] = columns[name]
        for name in ("last_seen", "count"):
            if name in columns:
                self.book[name][rows] = columns[name]

    def _named(self, *, state: bool) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for group, array in self._values.items():
            yield f"value.{group}", array.rows
        for group, arrays in self._states.items() if state else ():
            for name, array in arrays.items():
                yield f"state.{group}.{name}", array.rows

    def _all(self) -> list[RowArray]:
        return [self._book, *self._values.values(), *(array for arrays in self._states.values() for array in arrays.values())]
