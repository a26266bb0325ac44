"""The rows of a table that the device holds: loaded when they are missing, written back when they go and have changed.

C slots, K moved rows, D embedding dim of a group.
"""

import numpy as np
import torch

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.tiers.config import TierConfig
from ninerank.embedding.tiers.slots import Slots
from ninerank.embedding.tiers.store import BLOCK_ROWS, Store
from ninerank.embedding.tiers.traffic import Traffic
from ninerank.fusion.kernels import storage
from ninerank.fusion.lookup import LookupGrad

__all__ = ["RowCache", "SlotGradients"]


class RowCache:
    """Columns of `store` in C slots on a device: `columns[name]` (C, D) or (C,)."""

    def __init__(self, store: Store, config: TierConfig, device: torch.device) -> None:
        self._record, self._device = store.record, device
        num_slots = min(config.cache_rows, store.num_rows)
        self.slots = Slots(num_slots, config.decay)
        self._is_dirty = np.zeros(num_slots, np.bool_)
        shapes = {column: (num_slots, column.width) if column.width else (num_slots,) for column in store.record.columns}
        self.columns = {column.name: storage.zeros(shape, column.dtype, device) for column, shape in shapes.items()}
        waits = config.placement == "disk"
        self.traffic = Traffic(store.words, device, is_threaded=config.prefetch, waits_for_disk=waits, name=store.name)
        self.num_evictions = 0

    def load(self, rows: Ints) -> Ints:
        """Bring distinct missing rows, rising, into the cache; returns their slots."""
        if len(rows) == 0:
            return rows
        records = self.traffic.take(rows)
        victims = self.slots.victims(len(rows) - (self.slots.num_slots - self.slots.used))
        self._write_back(victims)
        self.num_evictions += len(victims)
        slots = self.slots.assign(rows, victims)
        place = torch.from_numpy(slots).to(self._device)
        records = records.to(self._device, non_blocking=True)
        for column in self._record.columns:
            self.columns[column.name].index_copy_(0, place, column.of(records))
        return slots

    def _write_back(self, slots: Ints) -> None:
        changed = slots[self._is_dirty[slots]]
        if len(changed):
            place = torch.from_numpy(changed).to(self._device)
            moved = {name: tensor.index_select(0, place) for name, tensor in self.columns.items()}
            self.traffic.put(self.slots.row[changed], self._record.pack(moved))
            self._is_dirty[changed] = False

    def mark(self, slots: Ints) -> None:
        """Note that slots differ from the store."""
        self._is_dirty[slots] = True

    def flush(self) -> None:
        """Write every changed row to the store, and wait until it is there."""
        changed = np.flatnonzero(self._is_dirty)
        for first in range(0, len(changed), BLOCK_ROWS):
            self._write_back(changed[first : first + BLOCK_ROWS])
        self.traffic.wait()

    def clear(self) -> None:
        """Forget all rows, changed or not; none may be pinned."""
        self.traffic.drop()
        self.slots.clear()
        self._is_dirty[:] = False


class SlotGradients(PendingGradients):
    """Gradients by slot, summed up in the order of the rows that lie in the slots: a norm over them is the same for every cache."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._slots = cache.slots

    def coalesced(self, num_rows: int) -> LookupGrad | None:
        """One entry for each touched slot, in the order of the table's rows; num_rows: at least the number of slots."""
        grad = super().coalesced(min(num_rows, self._slots.num_slots))
        if grad is None:
            return None
        order = np.argsort(self._slots.row[grad.rows_N.cpu().numpy()])
        place = torch.from_numpy(order).to(grad.rows_N.device)
        grad = LookupGrad(grad.grad_GD.index_select(0, place), grad.rows_N.index_select(0, place))
        self._parts = [grad]
        return grad
