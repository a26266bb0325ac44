"""Delta export of a dynamic table, and a dynamic table that follows deltas."""

from collections.abc import Iterator, Mapping

import numpy as np

from ninerank.embedding.changes import BLOCK_ROWS, Changes, Column, RowBlock
from ninerank.embedding.dynamic.table import DynamicTable

__all__ = ["DynamicSource"]


class DynamicSource:
    """Rows of a table by raw id: the values of every group, or with `state` all that a checkpoint holds of a row.

    A row counts as changed when a training step looked it up or updated it. An id that was given up is kept in mind until the next base
    (about 21 to 43 bytes each), and so is told from one that came back since. Needs `track_changes` in the table's configuration.
    """

    def __init__(self, table: DynamicTable, *, state: bool = False) -> None:
        if not table.config.track_changes:
            raise ValueError(f"dynamic table {table.name!r}: delta export needs track_changes = true in its configuration")
        self._table, self._state = table, state

    @property
    def columns(self) -> Mapping[str, Column]:
        return self._table.storage.columns(state=self._state)

    @property
    def generation(self) -> int:
        return self._table.generation

    def advance(self) -> int:
        self._table.version += 1
        return self._table.version - 1

    def changes(self, since: int) -> Changes:
        storage = self._table.storage
        book = storage.book
        rows = np.flatnonzero((book["version"] > since) & (book["count"] > 0))
        rows = rows[np.argsort(book["id"][rows])]
        ids, versions = self._table.removed.items()
        return Changes(storage.gather(rows, state=self._state), ids[versions > since])

    def blocks(self) -> Iterator[RowBlock]:
        storage = self._table.storage
        rows = self._table.rows_by_id()
        for first in range(0, len(rows), BLOCK_ROWS):
            yield storage.gather(rows[first : first + BLOCK_ROWS], state=self._state)

    def forget(self, version: int) -> None:
        removed = self._table.removed
        ids, versions = removed.items()
        removed.remove(ids[versions <= version])
