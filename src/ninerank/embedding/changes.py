"""What changed in a table since when: the contract between tables and delta export, and the tracker of static tables.

Rows are named by id: the raw id of a dynamic table, the row number of a static one.
K rows, V rows of a merged storage, W width of a column (0 for a plain number).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ninerank.embedding.table import TableLayout

__all__ = ["Changes", "Column", "DeltaSource", "RowBlock", "StaticTracker", "column_of"]

BLOCK_ROWS = 65_536

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class Column(NamedTuple):
    """Type of a column: NumPy dtype by name, numbers per row (0: one number, no axis)."""

    dtype: str
    width: int


def column_of(values: Array) -> Column:
    """Type of a column (K, W) or (K,)."""
    return Column(values.dtype.name, values.shape[1] if values.ndim == 2 else 0)


class RowBlock(NamedTuple):
    """Rows in rising order of their distinct ids: ids (K,), columns (K, W) or (K,)."""

    ids: Ints
    columns: Mapping[str, Array]


class Changes(NamedTuple):
    """What happened to a table: rows that are new or differ, and ids (rising) that are gone; no id is in both."""

    upserts: RowBlock
    removed: Ints


class DeltaSource(Protocol):
    """A table that knows which of its rows changed; one writer per source."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """What is exported of a row."""

    @property
    def generation(self) -> int:
        """Another number after the table was replaced as a whole, so that changes since before are not known."""

    def advance(self) -> int:
        """Close the current version and return it; later changes belong to later versions."""

    def changes(self, since: int) -> Changes:
        """Changes in versions after `since`."""

    def blocks(self) -> Iterator[RowBlock]:
        """All rows, in rising order of the ids over all blocks."""

    def forget(self, version: int) -> None:
        """Changes up to `version` will not be asked for any more."""


class StaticTracker:
    """Versions of the rows of a merged storage: 4 bytes a row, one write per touched row and step.

    arrays: what is exported, (V, W) or (V,) tensors on the host that share the layout's rows, e.g. `{"value.deep": group.storage}`.
    """

    def __init__(self, layout: TableLayout, arrays: Mapping[str, Tensor]) -> None:
        self.layout = layout
        self.arrays = {name: tensor.detach().numpy() for name, tensor in arrays.items()}
        for name, array in self.arrays.items():
            if len(array) != layout.total_rows:
                raise ValueError(f"array {name!r} has {len(array)} rows, the layout {layout.total_rows}")
        self.version, self.generation = 1, 0
        self.version_V = np.zeros(layout.total_rows, np.uint32)

    def mark(self, row_K: Tensor) -> None:
        """Note that rows of the merged storage changed."""
        self.version_V[row_K.numpy()] = self.version

    def mark_all(self) -> None:
        """Note that the tables were replaced as a whole: deltas need a new base."""
        self.generation += 1

    def sources(self) -> dict[str, DeltaSource]:
        """One source per table."""
        return {name: _StaticSource(self, rows) for name, rows in self.layout.items()}


class _StaticSource:
    def __init__(self, tracker: StaticTracker, rows: slice) -> None:
        self._tracker, self._first, self._stop = tracker, rows.start, rows.stop

    @property
    def columns(self) -> Mapping[str, Column]:
        return {name: column_of(array) for name, array in self._tracker.arrays.items()}

    @property
    def generation(self) -> int:
        return self._tracker.generation

    def advance(self) -> int:
        self._tracker.version += 1
        return self._tracker.version - 1

    def changes(self, since: int) -> Changes:
        rows = np.flatnonzero(self._tracker.version_V[self._first : self._stop] > since)
        columns = {name: array[self._first + rows] for name, array in self._tracker.arrays.items()}
        return Changes(RowBlock(rows, columns), np.empty(0, np.int64))

    def blocks(self) -> Iterator[RowBlock]:
        for first in range(self._first, self._stop, BLOCK_ROWS):
            stop = min(first + BLOCK_ROWS, self._stop)
            columns = {name: array[first:stop] for name, array in self._tracker.arrays.items()}
            yield RowBlock(np.arange(first - self._first, stop - self._first), columns)

    def forget(self, version: int) -> None:
        """Nothing is kept beyond one version per row."""
