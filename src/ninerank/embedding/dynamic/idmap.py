"""Map from raw 64-bit ids to whole numbers: open addressing, linear probing, no tombstones.

A slot is 16 bytes, the id and its value, so that a probe touches one cache line most of the time; value 0 marks a free slot, and
therefore every one of the 2^64 ids is valid and no two ids ever share a value. The home of an id is given by the high bits of a
keyed mixer: ids that agree in any bits spread, ids chosen to collide need the key (drawn per map), and doubling keeps the order of
the slots, so that a rehash streams through memory once and gives the old pages back as it goes. Removal shifts the run behind it
back (Knuth, TAOCP vol. 3, 6.4, algorithm R): a map that has seen any number of removals is as good as new.

Memory: 16 bytes / load factor, which lies between 0.375 and 0.75 while a map grows: 21.3 to 42.7 bytes per id.
"""

import math
import secrets
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ninerank.embedding.dynamic.native import AHEAD, mix64, prefetch
from ninerank.embedding.dynamic.reserve import Region
from ninerank.features.native import jit

__all__ = ["IdMap", "Ints", "home", "seek"]

Ints = npt.NDArray[np.int64]

MIN_BITS = 4
MAX_LOAD = 0.75
SLOT_BYTES = 16
REHASH_SLOTS = 1 << 20
LEAST_SAMPLE = 4096


@jit
def home(word, key, shift):  # type: ignore[no-untyped-def]
    """First slot (int64) that the id `word` (int64) is looked for in."""
    return np.int64(mix64(np.uint64(word) ^ key) >> shift)


@jit
def seek(slots, key, shift, word):  # type: ignore[no-untyped-def]
    """Slot that holds the id `word`, or the free slot where it belongs."""
    last = slots.shape[0] - 1
    slot = home(word, key, shift)
    while slots[slot, 1] != 0 and slots[slot, 0] != word:
        slot = (slot + 1) & last
    return slot


@jit
def _find(slots, key, shift, ids, out):  # type: ignore[no-untyped-def]
    count = ids.shape[0]
    for i in range(min(AHEAD, count)):
        prefetch(slots, 2 * home(ids[i], key, shift))
    for i in range(count):
        if i + AHEAD < count:
            prefetch(slots, 2 * home(ids[i + AHEAD], key, shift))
        out[i] = slots[seek(slots, key, shift, ids[i]), 1]


@jit
def _put(slots, key, shift, ids, values, first, size, limit):  # type: ignore[no-untyped-def]
    """Set values from position `first` on; stops where a new id would pass `limit`. Returns (next position, size)."""
    count = ids.shape[0]
    for i in range(first, count):
        if i + AHEAD < count:
            prefetch(slots, 2 * home(ids[i + AHEAD], key, shift))
        slot = seek(slots, key, shift, ids[i])
        if slots[slot, 1] == 0:
            if size >= limit:
                return i, size
            size += 1
            slots[slot, 0] = ids[i]
        slots[slot, 1] = values[i]
    return count, size


@jit
def _remove(slots, key, shift, ids, out):  # type: ignore[no-untyped-def]
    """Take ids out and leave their values, or 0, in `out`. Returns how many there were."""
    last = slots.shape[0] - 1
    count, removed = ids.shape[0], 0
    for i in range(count):
        if i + AHEAD < count:
            prefetch(slots, 2 * home(ids[i + AHEAD], key, shift))
        hole = seek(slots, key, shift, ids[i])
        out[i] = slots[hole, 1]
        if out[i] == 0:
            continue
        removed += 1
        slot = hole
        while True:
            slot = (slot + 1) & last
            if slots[slot, 1] == 0:
                break
            # An entry may fill the hole unless its home lies behind the hole.
            if ((slot - home(slots[slot, 0], key, shift)) & last) >= ((slot - hole) & last):
                slots[hole, 0], slots[hole, 1] = slots[slot, 0], slots[slot, 1]
                hole = slot
        slots[hole, 1] = 0
    return removed


@jit
def _rehash(old, first, stop, slots, key, shift):  # type: ignore[no-untyped-def]
    for i in range(first, stop):
        if old[i, 1] != 0:
            slot = seek(slots, key, shift, old[i, 0])
            slots[slot, 0], slots[slot, 1] = old[i, 0], old[i, 1]


@jit
def _items(slots, first, ids, values):  # type: ignore[no-untyped-def]
    """Fill `ids` and `values` from slot `first` on until they are full. Returns (next slot, how many)."""
    count = 0
    for slot in range(first, slots.shape[0]):
        if count == ids.shape[0]:
            return slot, count
        if slots[slot, 1] != 0:
            ids[count], values[count] = slots[slot, 0], slots[slot, 1]
            count += 1
    return slots.shape[0], count


@jit
def _longest_probe(slots, key, shift):  # type: ignore[no-untyped-def]
    last, longest = slots.shape[0] - 1, 0
    for slot in range(slots.shape[0]):
        if slots[slot, 1] != 0:
            longest = max(longest, ((slot - home(slots[slot, 0], key, shift)) & last) + 1)
    return longest


def _bits_for(expected: int) -> int:
    """Bits of the least number of slots that hold `expected` ids."""
    return max(MIN_BITS, (math.ceil(expected / MAX_LOAD) - 1).bit_length())


class IdMap:
    """Map from int64 ids to int64 values other than 0; grows as ids come.

    Not safe for writers beside others; any number of threads may `find` at once (kernels run without the GIL).

    >>> ids = IdMap()
    >>> ids.put(np.array([0, -1, 7]), np.array([10, 20, 30]))
    >>> ids.find(np.array([7, 8, -1])).tolist(), len(ids)
    ([30, 0, 20], 3)
    """

    def __init__(self, expected: int = 0, *, key: int | None = None) -> None:
        self.key = np.uint64(secrets.randbits(64) if key is None else key)
        self._allocate(_bits_for(expected))
        self._size = 0

    def _allocate(self, bits: int) -> None:
        self._region = Region(SLOT_BYTES << bits)
        self.slots: Ints = np.frombuffer(self._region.memory, np.int64, count=2 << bits).reshape(1 << bits, 2)
        self.shift = np.uint64(64 - bits)
        self.limit = int(MAX_LOAD * (1 << bits))

    def __len__(self) -> int:
        return self._size

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def load_factor(self) -> float:
        return self._size / self.num_slots

    @property
    def num_bytes(self) -> int:
        return self.num_slots * SLOT_BYTES

    def find(self, ids: Ints) -> Ints:
        """Value of each id, 0 where there is none."""
        out = np.empty(len(ids), np.int64)
        _find(self.slots, self.key, self.shift, ids, out)
        return out

    def put(self, ids: Ints, values: Ints) -> None:
        """Set the value (not 0) of each id; of an id that comes twice the last value stays."""
        if not values.all():
            raise ValueError(f"value 0 of id {int(ids[int(np.argmin(values != 0))])}: 0 says that an id is absent; any other is allowed")
        done, before = 0, self._size
        while True:
            done, self._size = _put(self.slots, self.key, self.shift, ids, values, done, self._size, self.limit)
            if done == len(ids):
                return
            self.make_room(done, self._size - before, len(ids))

    def remove(self, ids: Ints) -> Ints:
        """Take ids out; returns their values, 0 for those that were not there."""
        out = np.empty(len(ids), np.int64)
        self._size -= _remove(self.slots, self.key, self.shift, ids, out)
        return out

    def clear(self) -> None:
        """Forget all ids and give the memory back."""
        self._allocate(MIN_BITS)
        self._size = 0

    def resize(self, size: int) -> None:
        """State the number of ids after a kernel wrote into `slots` itself."""
        self._size = size

    def make_room(self, done: int, added: int, total: int) -> None:
        """Grow in the midst of a batch: `done` of its `total` ids brought `added` new ones, and the rest is taken to be alike."""
        share = added / done if done >= LEAST_SAMPLE else 0.0
        self.grow(self._size + int(share * (total - done)))

    def grow(self, expected: int = 0) -> None:
        """Double the slots, or more, so that `expected` ids fit."""
        old_region, old = self._region, self.slots
        self._allocate(max(len(old).bit_length(), _bits_for(expected)))
        for first in range(0, len(old), REHASH_SLOTS):
            stop = min(first + REHASH_SLOTS, len(old))
            _rehash(old, first, stop, self.slots, self.key, self.shift)
            old_region.release(first * SLOT_BYTES, stop * SLOT_BYTES)

    def blocks(self, block: int = 1 << 20) -> Iterator[tuple[Ints, Ints]]:
        """All (ids, values), in no order that means anything, at most `block` at a time."""
        slot = 0
        while slot < self.num_slots:
            ids, values = np.empty(block, np.int64), np.empty(block, np.int64)
            slot, count = _items(self.slots, slot, ids, values)
            yield ids[:count], values[:count]

    def items(self) -> tuple[Ints, Ints]:
        """All ids in rising order, and their values."""
        ids, values = np.empty(self._size, np.int64), np.empty(self._size, np.int64)
        _items(self.slots, 0, ids, values)
        order = np.argsort(ids)
        return ids[order], values[order]

    def longest_probe(self) -> int:
        """Most slots that any lookup of an id in the map has to read."""
        return int(_longest_probe(self.slots, self.key, self.shift))
