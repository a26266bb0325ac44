"""Kernels that turn raw ids into rows: known ids, ids that get a row now, and the distinct ones among those that may not."""

import numpy as np

from ninerank.embedding.dynamic.idmap import IdMap, Ints, home, seek
from ninerank.embedding.dynamic.native import AHEAD, prefetch
from ninerank.features.native import jit

__all__ = ["intern", "occurrences"]


@jit
def intern(slots, key, shift, ids, first, size, limit, free, num_free, used, num_rows, rows, fresh, num_fresh):  # type: ignore[no-untyped-def]
    """Row of each id from position `first` on, a free one or the next unused one for an id the map does not hold.

    rows, fresh: int64 (N,) outputs; `fresh` lists the positions at which an id got its row. Stops where a new id would pass the map's
    `limit` or the storage's `num_rows`. Returns (next position, size, num_free, used, num_fresh).
    """
    count = ids.shape[0]
    for i in range(first, count):
        if i + AHEAD < count:
            prefetch(slots, 2 * home(ids[i + AHEAD], key, shift))
        slot = seek(slots, key, shift, ids[i])
        if slots[slot, 1] == 0:
            if size >= limit or (num_free == 0 and used >= num_rows):
                return i, size, num_free, used, num_fresh
            size += 1
            if num_free:
                num_free -= 1
                row = free[num_free]
            else:
                row = used
                used += 1
            slots[slot, 0], slots[slot, 1] = ids[i], row
            fresh[num_fresh] = i
            num_fresh += 1
        rows[i] = slots[slot, 1]
    return count, size, num_free, used, num_fresh


@jit
def _number(slots, key, shift, ids, which, counts):  # type: ignore[no-untyped-def]
    """Number the distinct ids in the order of their first occurrence, in an empty map that is large enough for all.

    which: int64 (N,) output, the number of each id. counts: int64 (N,) output, occurrences of each number. Returns how many there are.
    """
    found = 0
    for i in range(ids.shape[0]):
        slot = seek(slots, key, shift, ids[i])
        if slots[slot, 1] == 0:
            slots[slot, 0], slots[slot, 1] = ids[i], found + 1
            counts[found] = 0
            found += 1
        which[i] = slots[slot, 1] - 1
        counts[which[i]] += 1
    return found


def occurrences(ids: Ints) -> tuple[Ints, Ints, Ints]:
    """Which distinct id each of `ids` (N,) is, in the order of their first occurrence; how often each one occurs, and where first.

    >>> [part.tolist() for part in occurrences(np.array([7, -1, 7]))]
    [[0, 1, 0], [2, 1], [0, 1]]
    """
    scratch = IdMap(len(ids))
    which, counts = np.empty((2, len(ids)), np.int64)
    found = _number(scratch.slots, scratch.key, scratch.shift, ids, which, counts)
    first = np.empty(found, np.int64)
    first[which[::-1]] = np.arange(len(ids))[::-1]
    return which, counts[:found], first
