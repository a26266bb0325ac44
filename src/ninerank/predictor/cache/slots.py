"""Kernels of the shared table: entries by id in memory that several processes map, read without locks.

    header | times of invalidation | buckets: sequence number, first entry + 1 | blocks

Zeros are an empty table, and memory that was never used is never touched. FREE is the first of the blocks that were given back, UNUSED
the first that was never used, FREE_BLOCKS counts both.

An entry is one block, or several where its id and value need more than one holds. A reader notes its bucket's sequence number, follows
the bucket's entries, copies the one it wants, and starts over if the number has changed meanwhile: whatever changes an entry of a bucket
makes the number odd before and even after. So a row is read whole or not at all. Writers hold the table's lock (`shared`), one at a time.

Where memory runs out the CLOCK algorithm evicts: the hand passes entries that were read since it last came by. Readers and writers are in
one module, since each rests on the order in which the other touches memory.

All of it is one module, long as it is: every kernel stands on the layout below, and nothing else may know it.

Shape legend: N ids.
"""

from typing import Final

import numpy as np

from ninerank.features.hashing import xxh64
from ninerank.features.native import jit, load_i32, load_i64, load_u8, load_u32
from ninerank.predictor.cache.layout import EVENT_AT
from ninerank.predictor.cache.native import copy, equal, fence, load_sequence, prefetch, store_i64, store_sequence, store_u8, store_u32

__all__ = ["clear", "find", "invalidate", "invalidate_all", "put", "rebuild"]

HEADER_BYTES: Final = 512
STRIPES: Final = 4096
BUCKETS_AT: Final = HEADER_BYTES + 8 * STRIPES
BUCKET_BYTES: Final = 16
# Words of the header.
MAGIC, DIGEST, NUM_BUCKETS, NUM_BLOCKS, BLOCK_BYTES, FREE, FREE_BLOCKS, UNUSED, HAND, ENTRIES, BYTES, EVICTIONS, DIRTY = (
    8 * n for n in range(13)
)
# Fields of an entry's first block; a block that goes on with it has NEXT_BLOCK, STATE and payload alone.
NEXT_BLOCK, STATE, REFERENCED, NEXT_ENTRY, KEY_BYTES = 0, 4, 5, 8, 12
HASH, FETCHED, FRESH_UNTIL, VALUE_BYTES = 16, 24, 32, 40
PAYLOAD: Final = 48
MORE_PAYLOAD: Final = 8
FREE_STATE, FIRST, MORE = 0, 1, 2
# What `find` says of an id.
MISS, HIT, EXPIRED, NEGATIVE, NEGATIVE_EXPIRED, BUSY = range(6)
ATTEMPTS: Final = 1000
LINE_BYTES: Final = 64
MAX_LINES: Final = 8
MAX_CHAIN: Final = 4096
# What `put` says of a row.
STORED, OLDER, TOO_LARGE, OVERTAKEN = range(4)
SEED = np.uint64(0x9A0C)


@jit
def _word(base, field):  # type: ignore[no-untyped-def]
    return load_i64(base + field)


@jit
def _bucket(base, h):  # type: ignore[no-untyped-def]
    return base + BUCKETS_AT + BUCKET_BYTES * np.int64(h & np.uint64(_word(base, NUM_BUCKETS) - 1))


@jit
def _block(base, index):  # type: ignore[no-untyped-def]
    blocks = base + BUCKETS_AT + BUCKET_BYTES * _word(base, NUM_BUCKETS)
    return blocks + index * _word(base, BLOCK_BYTES)


@jit
def _stripe(base, h):  # type: ignore[no-untyped-def]
    return base + HEADER_BYTES + 8 * np.int64(h >> np.uint64(52))


@jit
def _blocks_of(base, size):  # type: ignore[no-untyped-def]
    """Blocks that `size` bytes of id and value need."""
    block = _word(base, BLOCK_BYTES)
    more = size - (block - PAYLOAD)
    return 1 if more <= 0 else 1 + (more + block - MORE_PAYLOAD - 1) // (block - MORE_PAYLOAD)


@jit
def _read(base, entry, skip, size, target):  # type: ignore[no-untyped-def]
    """Copy payload bytes skip..skip + size of an entry; False where its blocks do not lead on, as they may while it changes."""
    block_bytes, num_blocks = _word(base, BLOCK_BYTES), _word(base, NUM_BLOCKS)
    at, room = entry + PAYLOAD, block_bytes - PAYLOAD
    block, done = entry, np.int64(0)
    while True:
        if skip < room:
            part = min(room - skip, size - done)
            copy(target + done, at + skip, part)
            done += part
            skip = np.int64(0)
            if done == size:
                return True
        else:
            skip -= room
        following = np.int64(load_i32(block + NEXT_BLOCK))
        if following < 0 or following >= num_blocks:
            return False
        block = _block(base, following)
        at, room = block + MORE_PAYLOAD, block_bytes - MORE_PAYLOAD


@jit
def _same_id(base, entry, id_at, id_bytes):  # type: ignore[no-untyped-def]
    """Whether an entry has that id."""
    if np.int64(load_u32(entry + KEY_BYTES)) != id_bytes:
        return False
    block_bytes, num_blocks = _word(base, BLOCK_BYTES), _word(base, NUM_BLOCKS)
    at, room, block, done = entry + PAYLOAD, block_bytes - PAYLOAD, entry, np.int64(0)
    while True:
        part = min(room, id_bytes - done)
        if not equal(at, id_at + done, part):
            return False
        done += part
        if done == id_bytes:
            return True
        following = np.int64(load_i32(block + NEXT_BLOCK))
        if following < 0 or following >= num_blocks:
            return False
        block = _block(base, following)
        at, room = block + MORE_PAYLOAD, block_bytes - MORE_PAYLOAD


@jit
def _entry_of(base, bucket, h, id_at, id_bytes):  # type: ignore[no-untyped-def]
    """Index of the block that holds an id, -1 for none."""
    num_blocks = _word(base, NUM_BLOCKS)
    index = load_i64(bucket + 8) - 1
    for _ in range(MAX_CHAIN):
        if index < 0 or index >= num_blocks:
            return np.int64(-1)
        entry = _block(base, index)
        if np.uint64(load_i64(entry + HASH)) == h and _same_id(base, entry, id_at, id_bytes):
            return index
        index = np.int64(load_i32(entry + NEXT_ENTRY))
    return np.int64(-1)


@jit
def _fetch_ahead(base, ids_at, ends_at, count):  # type: ignore[no-untyped-def]
    """Ask for the memory of all buckets, then of all their first entries, so that the waits for it overlap."""
    bucket_N = np.empty(count, np.int64)
    for row in range(count):
        start = np.int64(load_i32(ends_at + 4 * row))
        bucket_N[row] = _bucket(base, xxh64(ids_at + start, np.int64(load_i32(ends_at + 4 * row + 4)) - start, SEED))
        prefetch(bucket_N[row])
    num_blocks, lines = _word(base, NUM_BLOCKS), min(_word(base, BLOCK_BYTES) // LINE_BYTES + 1, MAX_LINES)
    for row in range(count):
        index = load_i64(bucket_N[row] + 8) - 1
        if 0 <= index < num_blocks:
            entry = _block(base, index)
            for line in range(lines):
                prefetch(entry + LINE_BYTES * line)


@jit
def find(base, ids_at, ends_at, now, target, room, address_N, length_N, fetched_N, status_N):  # type: ignore[no-untyped-def]
    """Look ids up and copy their values one behind the other to `target`, which has `room` bytes.

    The id of row n is the bytes ends[n]..ends[n + 1] (int32) at ids_at; an empty one is no id. Returns the bytes that all values need:
    where that is more than `room`, those that did not fit are not there, and the call is made again with more.
    """
    used = np.int64(0)
    _fetch_ahead(base, ids_at, ends_at, address_N.shape[0])
    for row in range(address_N.shape[0]):
        start = np.int64(load_i32(ends_at + 4 * row))
        id_at, id_bytes = ids_at + start, np.int64(load_i32(ends_at + 4 * row + 4)) - start
        address_N[row], length_N[row], fetched_N[row], status_N[row] = 0, 0, 0, MISS
        if id_bytes == 0:
            continue
        h = xxh64(id_at, id_bytes, SEED)
        bucket = _bucket(base, h)
        status_N[row] = BUSY
        for _ in range(ATTEMPTS):
            sequence = load_sequence(bucket)
            if sequence & 1:
                continue
            index = _entry_of(base, bucket, h, id_at, id_bytes)
            status, size, fetched, whole = MISS, np.int64(0), np.int64(0), True
            entry = np.int64(0)
            if index >= 0:
                entry = _block(base, index)
                size = np.int64(load_u32(entry + VALUE_BYTES))
                fetched = load_i64(entry + FETCHED)
                is_fresh = now < load_i64(entry + FRESH_UNTIL)
                if size == 0:
                    status = NEGATIVE if is_fresh else NEGATIVE_EXPIRED
                else:
                    status = HIT if is_fresh else EXPIRED
                    if used + size <= room:
                        whole = _read(base, entry, id_bytes, size, target + used)
            fence()
            if load_sequence(bucket) != sequence or not whole:
                continue
            status_N[row], length_N[row], fetched_N[row] = status, size, fetched
            address_N[row] = target + used
            used += size
            if index >= 0 and load_u8(entry + REFERENCED) == 0:
                store_u8(entry + REFERENCED, np.int64(1))
            break
    return used


@jit
def _free(base, index):  # type: ignore[no-untyped-def]
    """Give an entry's blocks back; it is in no bucket any more."""
    free, count = _word(base, FREE), np.int64(0)
    store_u8(_block(base, index) + STATE, np.int64(FREE_STATE))
    while index >= 0:
        block = _block(base, index)
        following = np.int64(load_i32(block + NEXT_BLOCK))
        store_u8(block + STATE, np.int64(FREE_STATE))
        store_u32(block + NEXT_BLOCK, free)
        free = index
        count += 1
        index = following
    store_i64(base + FREE, free)
    store_i64(base + FREE_BLOCKS, _word(base, FREE_BLOCKS) + count)


@jit
def _remove(base, index):  # type: ignore[no-untyped-def]
    """Take an entry out of its bucket and give its blocks back."""
    entry = _block(base, index)
    bucket = _bucket(base, np.uint64(load_i64(entry + HASH)))
    sequence = load_sequence(bucket)
    store_sequence(bucket, sequence | 1)
    fence()
    following = np.int64(load_i32(entry + NEXT_ENTRY))
    at = load_i64(bucket + 8) - 1
    if at == index:
        store_i64(bucket + 8, following + 1)
    else:
        while np.int64(load_i32(_block(base, at) + NEXT_ENTRY)) != index:
            at = np.int64(load_i32(_block(base, at) + NEXT_ENTRY))
        store_u32(_block(base, at) + NEXT_ENTRY, following)
    size = np.int64(load_u32(entry + KEY_BYTES)) + np.int64(load_u32(entry + VALUE_BYTES))
    _free(base, index)
    store_i64(base + ENTRIES, _word(base, ENTRIES) - 1)
    store_i64(base + BYTES, _word(base, BYTES) - size)
    store_sequence(bucket, (sequence | 1) + 1)


@jit
def _evict(base, keep):  # type: ignore[no-untyped-def]
    """Turn the hand to the first entry that was not read since it last came by, and remove it; False where there is none but `keep`."""
    used = _word(base, UNUSED)
    hand = _word(base, HAND)
    for _ in range(2 * used + 1):
        index = hand
        hand = hand + 1 if hand + 1 < used else np.int64(0)
        block = _block(base, index)
        if load_u8(block + STATE) != FIRST or index == keep:
            continue
        if load_u8(block + REFERENCED) != 0:
            store_u8(block + REFERENCED, np.int64(0))
            continue
        store_i64(base + HAND, hand)
        _remove(base, index)
        store_i64(base + EVICTIONS, _word(base, EVICTIONS) + 1)
        return True
    return False


@jit
def _write(base, entry, skip, source, size):  # type: ignore[no-untyped-def]
    """Copy bytes to payload bytes skip..skip + size of an entry whose blocks are linked."""
    block_bytes = _word(base, BLOCK_BYTES)
    at, room, block, done = entry + PAYLOAD, block_bytes - PAYLOAD, entry, np.int64(0)
    while done < size:
        if skip < room:
            part = min(room - skip, size - done)
            copy(at + skip, source + done, part)
            done += part
            skip = np.int64(0)
        else:
            skip -= room
        if done < size:
            block = _block(base, np.int64(load_i32(block + NEXT_BLOCK)))
            at, room = block + MORE_PAYLOAD, block_bytes - MORE_PAYLOAD


@jit
def put(base, ids_at, ends_at, address_N, length_N, started, now, until_N, result_N):  # type: ignore[no-untyped-def]
    """Insert or replace; a length of 0 says that the id does not exist. What became of each row is in result_N.

    started: when the rows were asked for (monotonic ns): an id that was invalidated since is left alone. Of two values the one of the
    later event time stays.
    """
    for row in range(address_N.shape[0]):
        start = np.int64(load_i32(ends_at + 4 * row))
        id_at, id_bytes = ids_at + start, np.int64(load_i32(ends_at + 4 * row + 4)) - start
        value_at, size = address_N[row], length_N[row]
        needed = _blocks_of(base, id_bytes + size)
        if needed > _word(base, NUM_BLOCKS) or needed >= MAX_CHAIN or id_bytes == 0:
            result_N[row] = TOO_LARGE
            continue
        h = xxh64(id_at, id_bytes, SEED)
        if load_i64(_stripe(base, h)) > started:
            result_N[row] = OVERTAKEN
            continue
        bucket = _bucket(base, h)
        old = _entry_of(base, bucket, h, id_at, id_bytes)
        had = np.int64(0)
        if old >= 0:
            held = np.int64(load_u32(_block(base, old) + VALUE_BYTES))
            had = _blocks_of(base, id_bytes + held)
            if size and held and _event(base, _block(base, old), id_bytes) > load_i64(value_at + EVENT_AT):
                result_N[row] = OLDER
                continue
        enough = True
        while enough and _word(base, FREE_BLOCKS) + had < needed:
            enough = _evict(base, old)
        if not enough:
            result_N[row] = TOO_LARGE
            continue
        referenced = np.int64(0)
        if old >= 0:
            referenced = np.int64(load_u8(_block(base, old) + REFERENCED))
            _remove(base, old)
        first = _take(base, needed)
        entry = _block(base, first)
        sequence = load_sequence(bucket)
        store_sequence(bucket, sequence | 1)
        fence()
        store_u32(entry + KEY_BYTES, id_bytes)
        store_u32(entry + VALUE_BYTES, size)
        store_i64(entry + HASH, np.int64(h))
        store_i64(entry + FETCHED, np.int64(now))
        store_i64(entry + FRESH_UNTIL, until_N[row])
        # Not read yet: rows that come and are never asked for must not push out those that are.
        store_u8(entry + REFERENCED, referenced)
        _write(base, entry, np.int64(0), id_at, id_bytes)
        _write(base, entry, id_bytes, value_at, size)
        store_u32(entry + NEXT_ENTRY, load_i64(bucket + 8) - 1)
        fence()
        store_u8(entry + STATE, np.int64(FIRST))
        store_i64(bucket + 8, first + 1)
        store_sequence(bucket, (sequence | 1) + 1)
        store_i64(base + ENTRIES, _word(base, ENTRIES) + 1)
        store_i64(base + BYTES, _word(base, BYTES) + id_bytes + size)
        result_N[row] = STORED


@jit
def _take(base, count):  # type: ignore[no-untyped-def]
    """Chain of `count` free blocks, in no entry yet; index of the first."""
    first = np.int64(-1)
    for taken in range(count):
        index = _word(base, FREE)
        if index >= 0:
            store_i64(base + FREE, np.int64(load_i32(_block(base, index) + NEXT_BLOCK)))
        else:
            index = _word(base, UNUSED)
            store_i64(base + UNUSED, index + 1)
        block = _block(base, index)
        # Built from the back, so that the last one taken is the first of the chain.
        store_u8(block + STATE, np.int64(MORE if taken < count - 1 else FREE_STATE))
        store_u32(block + NEXT_BLOCK, first)
        first = index
    store_i64(base + FREE_BLOCKS, _word(base, FREE_BLOCKS) - count)
    return first


@jit
def _event(base, entry, id_bytes):  # type: ignore[no-untyped-def]
    """Event time of an entry's value, wherever its blocks split it."""
    scratch = np.empty(1, np.int64)
    _read(base, entry, id_bytes + EVENT_AT, np.int64(8), scratch.ctypes.data)
    return scratch[0]


@jit
def invalidate(base, ids_at, ends_at, count, now):  # type: ignore[no-untyped-def]
    """Values of `count` ids are past their time from now on, and what is being fetched of them is not kept; how many were held."""
    held = 0
    for row in range(count):
        start = np.int64(load_i32(ends_at + 4 * row))
        id_at, id_bytes = ids_at + start, np.int64(load_i32(ends_at + 4 * row + 4)) - start
        if id_bytes == 0:
            continue
        h = xxh64(id_at, id_bytes, SEED)
        store_i64(_stripe(base, h), np.int64(now))
        index = _entry_of(base, _bucket(base, h), h, id_at, id_bytes)
        if index >= 0:
            store_i64(_block(base, index) + FRESH_UNTIL, np.int64(0))
            held += 1
    return held


@jit
def invalidate_all(base, now):  # type: ignore[no-untyped-def]
    """Every value is past its time from now on."""
    for stripe in range(STRIPES):
        store_i64(base + HEADER_BYTES + 8 * stripe, np.int64(now))
    for index in range(_word(base, UNUSED)):
        block = _block(base, index)
        if load_u8(block + STATE) == FIRST:
            store_i64(block + FRESH_UNTIL, np.int64(0))


@jit
def clear(base):  # type: ignore[no-untyped-def]
    """Empty the table."""
    for bucket in range(_word(base, NUM_BUCKETS)):
        at = base + BUCKETS_AT + BUCKET_BYTES * bucket
        if load_i64(at + 8) != 0 or load_sequence(at) & 1:
            store_sequence(at, load_sequence(at) | 1)
            fence()
            store_i64(at + 8, np.int64(0))
            store_sequence(at, load_sequence(at) + 1)
    for index in range(_word(base, UNUSED)):
        store_u8(_block(base, index) + STATE, np.int64(FREE_STATE))
    store_i64(base + FREE, np.int64(-1))
    store_i64(base + FREE_BLOCKS, _word(base, NUM_BLOCKS))
    for field in (UNUSED, HAND, ENTRIES, BYTES):
        store_i64(base + field, np.int64(0))


@jit
def rebuild(base):  # type: ignore[no-untyped-def]
    """Put the table in order after a writer died in it: entries that are whole stay, the one it was at goes. Returns entries."""
    num_buckets = _word(base, NUM_BUCKETS)
    # A block that was taken from what was never used counts as used even if the counter was not written yet.
    used = min(_word(base, UNUSED) + 1, _word(base, NUM_BLOCKS))
    for bucket in range(num_buckets):
        at = base + BUCKETS_AT + BUCKET_BYTES * bucket
        store_sequence(at, load_sequence(at) | 1)
        fence()
        store_i64(at + 8, np.int64(0))
    owned = np.zeros(used, np.bool_)
    entries, total = np.int64(0), np.int64(0)
    for index in range(used):
        entry = _block(base, index)
        if load_u8(entry + STATE) != FIRST:
            continue
        size = np.int64(load_u32(entry + KEY_BYTES)) + np.int64(load_u32(entry + VALUE_BYTES))
        wanted, at, found = _blocks_of(base, size), np.int64(index), 0
        while found < wanted and 0 <= at < used and not owned[at]:
            block = _block(base, at)
            if found and load_u8(block + STATE) != MORE:
                break
            found += 1
            at = np.int64(load_i32(block + NEXT_BLOCK))
        if found < wanted or at != -1:
            continue
        at = np.int64(index)
        while at >= 0:
            owned[at] = True
            at = np.int64(load_i32(_block(base, at) + NEXT_BLOCK))
        bucket_at = _bucket(base, np.uint64(load_i64(entry + HASH)))
        store_u32(entry + NEXT_ENTRY, load_i64(bucket_at + 8) - 1)
        store_i64(bucket_at + 8, np.int64(index + 1))
        entries += 1
        total += size
    free, free_blocks = np.int64(-1), _word(base, NUM_BLOCKS) - used
    for back in range(used):
        index = used - 1 - back
        if not owned[index]:
            store_u8(_block(base, index) + STATE, np.int64(FREE_STATE))
            store_u32(_block(base, index) + NEXT_BLOCK, free)
            free = index
            free_blocks += 1
    store_i64(base + UNUSED, np.int64(used))
    store_i64(base + FREE, free)
    store_i64(base + FREE_BLOCKS, free_blocks)
    store_i64(base + ENTRIES, entries)
    store_i64(base + BYTES, total)
    for bucket in range(num_buckets):
        at = base + BUCKETS_AT + BUCKET_BYTES * bucket
        store_sequence(at, load_sequence(at) + 1)
    return entries
