"""Tables of one embedding dim merged in one storage, and the seam between lookup and optimizer.

A group holds the rows of all its tables in one tensor; table t owns the rows `offset[t] ... offset[t] + num_rows[t]`.
In dense mode the storage is an ordinary parameter. In sparse mode it takes no gradient: lookups run through the fused operators of
`fusion.lookup`, and their backward leaves the gradients of the touched rows in `gradients` for the sparse optimizer.

Shape legend: N looked-up ids, M bags (F features of B bags each), D embedding dim.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.pooling import pool_rows
from ninerank.fusion import lookup
from ninerank.fusion.kernels import storage as memory

__all__ = ["TableGroup", "TableLayout", "initial_rows"]

INIT_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class TableLayout:
    """Where each table's rows lie in the merged storage.

    >>> layout = TableLayout.of({"user": 3, "item": 5})
    >>> layout.offsets, layout.total_rows, layout.rows_of("item")
    ((0, 3), 8, slice(3, 8, None))
    """

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, num_rows: Mapping[str, int]) -> "TableLayout":
        sizes = tuple(num_rows.values())
        return cls(tuple(num_rows), sizes, tuple(accumulate(sizes, initial=0))[:-1])

    @property
    def total_rows(self) -> int:
        return sum(self.num_rows)

    def rows_of(self, name: str) -> slice:
        """Rows of one table in the merged storage."""
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i] + self.num_rows[i])

    def items(self) -> Iterator[tuple[str, slice]]:
        for name in self.names:
            yield name, self.rows_of(name)


def initial_rows(
    seed: int, group: str, table: str, num_rows: int, dim: int, std: float, *, first_row: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks (first row, float32 values) of one table drawn from N(0, std^2), from the one that holds `first_row` on.

    A row depends on seed, group, table name and row number alone: neither on other tables nor on the table's size, so that a
    shard of any world size, or a table with more rows, starts from the same values.
    """
    for first in range(first_row - first_row % INIT_BLOCK_ROWS, num_rows, INIT_BLOCK_ROWS):
        key = hashlib.sha256(f"{seed}\0{group}\0{table}\0{first}".encode()).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        rows = min(INIT_BLOCK_ROWS, num_rows - first)
        yield first, draw.standard_normal((rows, dim), dtype=np.float32) * np.float32(std)


class TableGroup(nn.Module):
    """All tables at one embedding dim, in one storage of `layout.total_rows` rows.

    `state_dict` holds one tensor per table, under the table's name, so that it does not depend on the order of the tables.
    elsewhere: tables of this group that lie in storages of their own, and load themselves from a state that names them here.
    """

    def __init__(self, name: str, layout: TableLayout, storage_VD: Tensor, *, sparse: bool) -> None:
        super().__init__()
        self.name = name
        self.layout = layout
        self.dim = storage_VD.shape[1]
        self.sparse = sparse
        self.storage = nn.Parameter(storage_VD, requires_grad=not sparse)
        self.gradients = PendingGradients()
        self.elsewhere: frozenset[str] = frozenset()

    @classmethod
    def drawn(cls, name: str, layout: TableLayout, dim: int, *, sparse: bool, init_std: float, seed: int) -> "TableGroup":
        """A group whose rows are the start values of `initial_rows`."""
        storage_VD = memory.zeros((layout.total_rows, dim), device=torch.get_default_device())
        for table, rows in layout.items():
            for first, block in initial_rows(seed, name, table, rows.stop - rows.start, dim, init_std):
                storage_VD[rows.start + first : rows.start + first + len(block)] = torch.tensor(block)
        return cls(name, layout, storage_VD, sparse=sparse)

    def rows(self, row_N: Tensor) -> Tensor:
        """Values (N, D) of rows of the merged storage, differentiable in the way of the group's mode."""
        if self.sparse:
            return lookup.sequence(self._recorded(), row_N, on_grad=self.gradients.add)
        return functional.embedding(row_N, self.storage)

    def pool(self, row_N: Tensor, offsets: Tensor | None, num_features: int, mean_F: Tensor | None = None) -> Tensor:
        """Bags (B, F, D): sums of each bag's rows, means for features with `mean_F`; rows lie feature by feature.

        offsets: (F * B + 1,) start of each bag, None where each holds one row.
        """
        if self.sparse:
            return lookup.pooled(self._recorded(), row_N, offsets, num_features, mean_F=mean_F, on_grad=self.gradients.add)
        return pool_rows(self.rows(row_N), offsets, num_features, mean_F)

    def _recorded(self) -> Tensor:
        """The storage as a lookup takes it whose gradient is caught."""
        return self.storage.detach().requires_grad_(torch.is_grad_enabled())

    def table(self, name: str) -> Tensor:
        """View (num_rows, D) of one table."""
        return self.storage.detach()[self.layout.rows_of(name)]

    def extra_repr(self) -> str:
        mode = "sparse" if self.sparse else "dense"
        return f"{self.name}: {len(self.layout.names)} tables, {self.layout.total_rows} rows x {self.dim}, {mode}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        storage = self.storage if keep_vars else self.storage.detach()
        for table, rows in self.layout.items():
            destination[prefix + table] = storage[rows]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for table, rows in self.layout.items():
            key = prefix + table
            if key not in state_dict:
                missing_keys.append(key)
                continue
            value, shape = state_dict[key], (rows.stop - rows.start, self.dim)
            if tuple(value.shape) != shape:
                error_msgs.append(f"table {key}: shape {tuple(value.shape)} in the state, {shape} in the model")
                continue
            with torch.no_grad():
                self.storage[rows].copy_(value)
        if strict:
            known = {prefix + table for table in (*self.layout.names, *self.elsewhere)}
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
