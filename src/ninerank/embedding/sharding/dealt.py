"""Managed tables over several processes: every id has one owner, which keeps its row.

A step of all tables together, each arrow one collective call:

    prepare   distinct ids of this process, with how often each occurs -> owners, which turn them into rows
    fetch     owners' values -> the processes that asked: a small table a batch, which lookups and their backward use
    send      gradients, summed over this process -> owners, where those of all processes wait as if one had looked them up

The owner is told all of a step's ids in one call, so that what a table decides by counts (admission) is decided as in one process.
Values travel after the rows are known and not with them: rows may be prepared before the update of the step before.

Shape legend: N ids of a batch, U distinct ones, R ids that processes ask this one for, D columns of a group, C of all groups and their
marks, W processes, T tables.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.dynamic.intern import occurrences
from ninerank.embedding.managed import ManagedTable
from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.pooling import pool_rows
from ninerank.embedding.sharding.exchange import by_process, by_table, swap, swap_sizes
from ninerank.features.spec import MISSING_ID
from ninerank.fusion.kernels.embedding_rows import row_dtype
from ninerank.fusion.lookup import LookupGrad, sequence

__all__ = ["Dealt", "DealtRows", "DealtTables"]

# Places of one batch are told from those of another by what stands above these bits.
PLACE_BITS = 32


@dataclass(frozen=True)
class Dealt:
    """This process's part of a table. owner_of: process of each id. first_id: of the part, which its table knows as id 0."""

    table: ManagedTable
    owner_of: Callable[[Ints], Ints]
    first_id: int = 0


@dataclass
class _Batch:
    """What is known of one batch. sent_WT, received_WT: ids to and from each process. rows: owner's rows (R,) of what was received.

    counted: which of the own ids (U,) occur in rows that are no padding; None for all. values: (U + 1, D) of each table and group, row 0
    of zeros.
    """

    base: int
    sent_WT: Tensor
    received_WT: Tensor
    rows: dict[str, Tensor]
    counted: dict[str, Tensor | None]
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[str, str], PendingGradients] = field(default_factory=dict)
    is_open: bool = True
    is_sent: bool = True

    def add(self, table: str, group: str, grad: LookupGrad) -> None:
        if not self.is_open:
            raise RuntimeError(f"table {table!r}: a backward pass came after the next batch was prepared; its rows are no longer known")
        self.gradients[table, group].add(grad)


class DealtTables:
    """All managed tables of a collection, of which each process holds its part; every method is a collective call unless it says otherwise.

    dims: of the groups, which every table has. device: of values and gradients on their way. wire: type in which these travel, None for
    float32. One batch is at work at a time: the one that was prepared last.
    """

    def __init__(self, tables: Mapping[str, Dealt], dims: Mapping[str, int], *, device: torch.device, wire: torch.dtype | None) -> None:
        self._tables, self._wire, self._device = dict(tables), wire, device
        bounds = list(accumulate(dims.values(), initial=0))
        self._columns = {group: slice(first, stop) for group, (first, stop) in zip(dims, pairwise(bounds), strict=True)}
        self._width = bounds[-1]
        self._world_size = dist.get_world_size()
        self._count = 0
        self._batch: _Batch | None = None

    def prepare(self, ids: Mapping[str, Tensor], is_real: Mapping[str, Tensor | None], *, step: int | None) -> dict[str, Tensor]:
        """Places (int64 (N,)) of a batch's ids, by table; is_real: which ids are of rows that are no padding, None for all."""
        if self._batch is not None and not self._batch.is_sent:
            self.send()
        self.retire()
        self._count += 1
        base = self._count << PLACE_BITS
        asked = {name: _Asked.of(ids[name].numpy(), is_real[name], own.owner_of, self._world_size) for name, own in self._tables.items()}
        sent_WT = torch.stack([own.size_W for own in asked.values()], dim=1)
        received_WT = swap_sizes(sent_WT)
        message = swap(by_process([own.id_times_U2 for own in asked.values()], sent_WT), sent_WT, received_WT)
        rows = {
            name: own.table.prepare(of_table[:, 0] - own.first_id, step=step, times=of_table[:, 1])
            for (name, own), of_table in zip(self._tables.items(), by_table(message, received_WT), strict=True)
        }
        self._batch = _Batch(base, sent_WT, received_WT, rows, {name: own.counted_U for name, own in asked.items()})
        return {name: own.place_N + base for name, own in asked.items()}

    def fetch(self, place: int | None) -> None:
        """Have the values of the batch that was prepared; place: of any of its ids, None where this process has none.

        Raises RuntimeError for places of another batch.
        """
        batch = self._batch
        if batch is None or (place is not None and place >> PLACE_BITS != batch.base >> PLACE_BITS):
            raise RuntimeError("tables over several processes look up the batch that was prepared last; prepare, then look up")
        batch.is_sent = batch.is_sent and not torch.is_grad_enabled()
        if batch.values:
            return
        with torch.no_grad():
            found = [
                torch.cat([own.table.rows(group, batch.rows[name]).to(self._device) for group in self._columns], dim=1)
                for name, own in self._tables.items()
            ]
            message = swap(by_process(found, batch.received_WT), batch.received_WT, batch.sent_WT, self._wire)
            for name, values_UD in zip(self._tables, by_table(message, batch.sent_WT), strict=True):
                for group, columns in self._columns.items():
                    batch.values[name, group] = torch.nn.functional.pad(values_UD[:, columns], (0, 0, 1, 0))
                    batch.gradients.setdefault((name, group), PendingGradients(skip_row=0))

    def rows(self, table: str, group: str, place_N: Tensor) -> Tensor:
        """Values (N, D) of places; the backward leaves gradients for `send`. No collective call: `fetch` comes before."""
        batch = self._batch
        assert batch is not None
        values_VD = batch.values[table, group].detach().requires_grad_(torch.is_grad_enabled())
        row_N = place_N.reshape(-1) - batch.base
        if row_N.device.type != "cpu":
            row_N = row_N.to(row_dtype(values_VD.shape[0]))
        return sequence(values_VD, row_N, on_grad=lambda grad: batch.add(table, group, grad))

    def send(self) -> None:
        """Give the owners the mean of all processes' gradients, by row; they wait in the tables then."""
        batch = self._batch
        if batch is None:
            return
        batch.is_sent = True
        marks = len(self._columns)
        found = []
        for place, name in enumerate(self._tables):
            # A mark a group says which rows have a gradient: those alone are updated.
            message_UC = torch.zeros(int(batch.sent_WT[:, place].sum()), self._width + marks, device=self._device)
            for mark, (group, columns) in enumerate(self._columns.items(), self._width):
                pending = batch.gradients.get((name, group))
                grad = None if pending is None else pending.coalesced(len(message_UC) + 1)
                if pending is not None and grad is not None:
                    row_K = grad.rows_N.long() - 1
                    message_UC[row_K, columns] = grad.grad_GD / self._world_size
                    message_UC[row_K, mark] = 1.0
                    pending.clear()
            counted_U = batch.counted[name]
            if counted_U is not None:
                message_UC[:, self._width :] *= counted_U.to(self._device)[:, None]
            found.append(message_UC)
        message = swap(by_process(found, batch.sent_WT), batch.sent_WT, batch.received_WT, self._wire)
        for (name, own), message_RC in zip(self._tables.items(), by_table(message, batch.received_WT), strict=True):
            for mark, (group, columns) in enumerate(self._columns.items(), self._width):
                place_K = message_RC[:, mark].nonzero().squeeze(1)
                if place_K.numel():
                    _leave(own.table, group, message_RC[place_K, columns], batch.rows[name][place_K.cpu()])

    def forget(self) -> None:
        """Drop gradients that were not sent. No collective call."""
        if self._batch is not None:
            for pending in self._batch.gradients.values():
                pending.clear()

    def changed(self) -> None:
        """Rows were updated: what was fetched is out of date. No collective call."""
        if self._batch is not None:
            self._batch.values.clear()

    def retire(self) -> None:
        """Let go of the batch. No collective call. Raises RuntimeError if gradients are left."""
        if self._batch is not None:
            if any(self._batch.gradients.values()):
                raise RuntimeError("a step ends with gradients left; call the optimizer's step or zero_grad first")
            self._batch.is_open = False
        self._batch = None


class DealtRows:
    """One group of a dealt table, looked up as a `TableGroup` is."""

    def __init__(self, tables: DealtTables, table: str, group: str) -> None:
        self._tables, self._table, self._group = tables, table, group

    def rows(self, row_N: Tensor) -> Tensor:
        """Values (N, D)."""
        return self._tables.rows(self._table, self._group, row_N)

    def pool(self, row_N: Tensor, offsets: Tensor | None, num_features: int, mean_F: Tensor | None = None) -> Tensor:
        """Bags (B, F, D)."""
        return pool_rows(self.rows(row_N), offsets, num_features, mean_F)


@dataclass(frozen=True)
class _Asked:
    """What a batch asks of one table: distinct ids in the order of their owners, each with its occurrences; place (N,) of each id, from 1
    on, 0 for a missing one; ids for each owner.
    """

    id_times_U2: Tensor
    place_N: Tensor
    size_W: Tensor
    counted_U: Tensor | None

    @classmethod
    def of(cls, ids: Ints, is_real: Tensor | None, owner_of: Callable[[Ints], Ints], world_size: int) -> "_Asked":
        present_P = np.flatnonzero(ids != MISSING_ID)
        which_P, times_U, first_U = occurrences(ids[present_P])
        id_U = ids[present_P][first_U]
        owner_U = owner_of(id_U)
        # Sorts by counting: NumPy does so for 16 bits and fewer.
        order = np.argsort(owner_U.astype(np.uint16), kind="stable")
        place_U = np.empty(len(order), np.int64)
        place_U[order] = np.arange(1, len(order) + 1)
        place_N = np.zeros(len(ids), np.int64)
        place_N[present_P] = place_U[which_P]
        counted_U = None
        if is_real is not None:
            times_U = np.bincount(which_P[is_real.numpy()[present_P]], minlength=len(id_U))
            counted_U = torch.from_numpy(times_U[order] > 0)
        id_times_U2 = np.stack([id_U[order], times_U[order]], axis=1)
        size_W = np.bincount(owner_U, minlength=world_size)
        return cls(torch.from_numpy(id_times_U2), torch.from_numpy(place_N), torch.from_numpy(size_W), counted_U)


def _leave(table: ManagedTable, group: str, grad_KD: Tensor, row_K: Tensor) -> None:
    """Gradients as a lookup of these rows would have left them."""
    table.gradients[group].add(LookupGrad(grad_KD.contiguous().to(table.device), row_K.to(table.device)))
