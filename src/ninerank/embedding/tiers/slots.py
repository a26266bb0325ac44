"""Which rows of a table the cache holds, in which slot, and which of them go when others come.

Least frequently used with decay: a slot's frequency counts the training batches that its row was in, each weighted by decay^age. It is
kept without touching all slots every step: instead of old counts falling, what a new batch adds grows by 1 / decay. With decay 1
this is LFU, with less it leans towards LRU (the family of Lee et al. 2001, LRFU, IEEE Trans. Computers 50:12).

The least used slots are looked for once for `cache / QUEUE_SHARE` evictions: they queue in the order (frequency, row), and one that is
used while it queues steps out. Caches of less than QUEUE_SHARE slots choose anew each time. Equal histories give equal choices.

N ids of a batch, P distinct slots among them, M distinct rows that are missing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ninerank.embedding.dynamic.eviction import smallest
from ninerank.embedding.dynamic.idmap import IdMap, Ints, home, seek
from ninerank.embedding.dynamic.native import AHEAD, prefetch
from ninerank.features.native import jit

__all__ = ["Found", "Slots"]

QUEUE_SHARE = 32
LARGEST_WEIGHT = 1e200


@jit
def _find(table, key, shift, ids, seen, now, slot_N, present, absent):  # type: ignore[no-untyped-def]
    """Slot of each id or -1; distinct slots in `present`, which are stamped `now`; positions without a slot in `absent`."""
    count, num_present, num_absent = ids.shape[0], 0, 0
    for i in range(count):
        if i + AHEAD < count:
            prefetch(table, 2 * home(ids[i + AHEAD], key, shift))
        slot = table[seek(table, key, shift, ids[i]), 1] - 1
        slot_N[i] = slot
        if slot < 0:
            absent[num_absent] = i
            num_absent += 1
        elif seen[slot] != now:
            seen[slot] = now
            present[num_present] = slot
            num_present += 1
    return num_present, num_absent


@dataclass(frozen=True)
class Found:
    """One batch: slot of each id, -1 where its row is missing; distinct slots; missing rows in rising order.

    position_A, row_A: positions of ids without a slot, and which of the missing rows each of them means.
    """

    slot_N: Ints
    present_P: Ints
    missing_M: Ints
    position_A: Ints
    row_A: Ints

    @property
    def num_distinct(self) -> int:
        return len(self.present_P) + len(self.missing_M)


class Slots:
    """Rows in `num_slots` slots."""

    def __init__(self, num_slots: int, decay: float) -> None:
        self.num_slots, self.decay = num_slots, decay
        self.row = np.full(num_slots, -1, np.int64)
        self.clear()

    def clear(self) -> None:
        """Forget all rows; none may be pinned."""
        self.used = self.num_pinned = 0
        self._ids = IdMap(self.num_slots)
        self._frequency = np.zeros(self.num_slots, np.float64)
        self._weight = 1.0
        self._pins = np.zeros(self.num_slots, np.int32)
        self._seen = np.zeros(self.num_slots, np.int64)
        self._now = 0
        self._queue, self._queued_at = np.empty(0, np.int64), 0

    @property
    def num_bytes(self) -> int:
        arrays: tuple[npt.NDArray[np.generic], ...] = (self.row, self._frequency, self._pins, self._seen)
        return self._ids.num_bytes + sum(array.nbytes for array in arrays)

    def absent(self, ids: Ints) -> Ints:
        """Distinct rows without a slot, rising; changes nothing."""
        return np.unique(ids[self._ids.find(ids) == 0])

    def find(self, ids: Ints) -> Found:
        """Begin a batch: until the next one, its slots are not given up."""
        self._now += 1
        slot_N, present, absent = np.empty((3, len(ids)), np.int64)
        table = self._ids
        num_present, num_absent = _find(table.slots, table.key, table.shift, ids, self._seen, self._now, slot_N, present, absent)
        position_A = absent[:num_absent].copy()
        missing_M, row_A = np.unique(ids[position_A], return_inverse=True)
        return Found(slot_N, present[:num_present].copy(), missing_M, position_A, row_A.reshape(-1))

    def num_available(self, found: Found) -> int:
        """Slots that the batch's missing rows may take: free ones, and those that neither it nor a batch in flight uses."""
        held = self.num_pinned + len(found.present_P) - int(np.count_nonzero(self._pins[found.present_P]))
        return self.num_slots - held

    def victims(self, count: int) -> Ints:
        """`count` slots to give up, the least used ones first; there must be as many (`num_available`)."""
        chosen: list[Ints] = []
        while count > 0:
            waiting = self._queue[(self._seen[self._queue] <= self._queued_at) & (self._pins[self._queue] == 0)]
            taken, self._queue = waiting[:count], waiting[count:]
            self._seen[taken] = self._now
            chosen.append(taken)
            count -= len(taken)
            if count > 0:
                self._line_up(max(count, self.num_slots // QUEUE_SHARE))
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)

    def _line_up(self, count: int) -> None:
        idle = np.flatnonzero((self._pins[: self.used] == 0) & (self._seen[: self.used] < self._now))
        assert len(idle), "more slots are asked for than are available"
        least = idle[smallest(count, self._frequency[idle], self.row[idle])]
        self._queue = least[np.lexsort((self.row[least], self._frequency[least]))]
        self._queued_at = self._now - 1

    def assign(self, rows: Ints, victims: Ints) -> Ints:
        """Give rows without a slot the free slots and then the victims'; returns the slot of each row."""
        self._ids.remove(self.row[victims])
        fresh = np.arange(self.used, self.used + len(rows) - len(victims))
        self.used += len(fresh)
        slots = np.concatenate([fresh, victims])
        self.row[slots], self._frequency[slots], self._seen[slots] = rows, 0.0, self._now
        self._ids.put(rows, slots + 1)
        return slots

    def count(self, slots: Ints) -> None:
        """Note that a training batch used these distinct slots."""
        self._frequency[slots] += self._weight

    def age(self) -> None:
        """End a training step: everything counted so far weighs less."""
        self._weight /= self.decay
        if self._weight > LARGEST_WEIGHT:
            self._frequency /= self._weight
            self._weight = 1.0

    def pin(self, slots: Ints) -> None:
        """Keep distinct slots from being given up until as many calls of `unpin`."""
        self.num_pinned += int(np.count_nonzero(self._pins[slots] == 0))
        self._pins[slots] += 1

    def unpin(self, slots: Ints) -> None:
        """Undo one `pin`."""
        self._pins[slots] -= 1
        self.num_pinned -= int(np.count_nonzero(self._pins[slots] == 0))
