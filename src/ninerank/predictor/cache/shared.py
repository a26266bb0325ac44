"""Rows by id in memory that all worker processes of a server map: read without locks, written by one at a time.

Shape legend: N ids.
"""

import errno
import fcntl
import mmap
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import DataError, RequestError
from ninerank.predictor.cache import slots
from ninerank.predictor.cache.value import MAX_DECODED_BYTES, Packed, RowFormat

__all__ = ["Found", "Ids", "SharedTable"]

MAGIC = int.from_bytes(b"9RSHARE1", "little")
MIN_BLOCKS = 64
ID_BYTES = 16
VARIABLE_BYTES = 24
FIRST_ROOM = 64 << 10
FOREVER = (1 << 63) - 1
WRITER_POLL_S = 50e-6


class Ids:
    """Ids as bytes one behind the other: int64 as 8 little-endian bytes, strings as UTF-8; a missing one is empty."""

    def __init__(self, ids: pa.Array) -> None:
        if pa.types.is_int64(ids.type):
            valid_N = ids.is_valid().to_numpy(zero_copy_only=False) if ids.null_count else np.ones(len(ids), np.bool_)
            held = ids.drop_null() if ids.null_count else ids
            self.ends = np.zeros(len(ids) + 1, np.int32)
            np.cumsum(valid_N, out=self.ends[1:])
            self.ends *= 8
            data = held.buffers()[1]
            self.address = data.address + 8 * held.offset if data is not None else 0
            self.ends_address = self.ends.ctypes.data
        else:
            held = ids.fill_null("") if ids.null_count else ids
            if not len(held):
                held = pa.array([""])
            _, ends, data = held.buffers()
            self.address = data.address if data is not None else 0
            self.ends_address = ends.address + 4 * held.offset
        self.array, self._held = ids, held

    def __len__(self) -> int:
        return len(self.array)


@dataclass(frozen=True)
class Found:
    """What a table holds of N ids. status_N: of `slots` (MISS, HIT, ...). fetched_N: monotonic ns at which each value was put."""

    values: Packed
    status_N: npt.NDArray[np.uint8]
    fetched_N: npt.NDArray[np.int64]


class SharedTable:
    """Values of one format by id, in `capacity_bytes` of memory; CLOCK evicts what was not read lately.

    `SharedTable(format, capacity_bytes)` makes one that is empty; `SharedTable.attach(format, path)` maps the one of another process,
    while that one lives. Any number of threads may call, in any number of processes. A process that dies while it writes costs the
    row it was writing. Raises DataError where the memory cannot be had or is another table's.
    """

    def __init__(self, row_format: RowFormat, capacity_bytes: int) -> None:
        block_bytes = _up(slots.PAYLOAD + ID_BYTES + row_format.fixed_bytes + VARIABLE_BYTES * row_format.variable_columns)
        num_blocks = (capacity_bytes - slots.BUCKETS_AT) // (block_bytes + slots.BUCKET_BYTES)
        if num_blocks < MIN_BLOCKS:
            least = slots.BUCKETS_AT + MIN_BLOCKS * (block_bytes + slots.BUCKET_BYTES)
            raise DataError(f"a feature cache of {capacity_bytes:,} bytes is too small for these features; at least {least:,}")
        num_buckets = 1 << (num_blocks.bit_length() - 1)
        size = slots.BUCKETS_AT + slots.BUCKET_BYTES * num_buckets + block_bytes * num_blocks
        fd = _memory(size)
        self._map(row_format, fd, size)
        words = self._words
        words[slots.DIGEST // 8] = row_format.digest_word
        words[slots.NUM_BUCKETS // 8], words[slots.NUM_BLOCKS // 8], words[slots.BLOCK_BYTES // 8] = num_buckets, num_blocks, block_bytes
        words[slots.FREE // 8], words[slots.FREE_BLOCKS // 8] = -1, num_blocks
        words[slots.MAGIC // 8] = MAGIC

    @classmethod
    def attach(cls, row_format: RowFormat, path: str) -> "SharedTable":
        """The table that another process made and calls `path`."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"feature cache {path}: cannot be shared ({error.strerror})") from None
        size = os.fstat(fd).st_size
        table = cls.__new__(cls)
        if size < slots.BUCKETS_AT:
            os.close(fd)
            raise DataError(f"feature cache {path}: is no feature cache")
        table._map(row_format, fd, size)
        held = table._words[: slots.DIGEST // 8 + 1].tolist()
        if held != [MAGIC, row_format.digest_word]:
            table.close()
            raise DataError(f"feature cache {path}: holds other features than {', '.join(row_format.names)}")
        return table

    def _map(self, row_format: RowFormat, fd: int, size: int) -> None:
        self.row_format, self.capacity_bytes = row_format, size
        self._fd, self._closed = fd, False
        self._memory = mmap.mmap(fd, size)
        self._words = np.frombuffer(self._memory, np.int64, slots.HEADER_BYTES // 8)
        self._base = self._words.ctypes.data
        self._room = FIRST_ROOM
        self._lock = _Lock.of(fd)
        self._release = weakref.finalize(self, self._lock.leave, fd)  # a table that nobody closed goes with its last reference

    @property
    def path(self) -> str:
        """What other processes of this machine call the memory."""
        return f"/proc/{os.getpid()}/fd/{self._fd}" if sys.platform == "linux" else f"/dev/fd/{self._fd}"

    def find(self, ids: Ids, now_ns: int) -> Found:
        """What the table holds of `ids` at `now_ns` (monotonic)."""
        count = len(ids)
        address_N, length_N, fetched_N = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
        status_N = np.empty(count, np.uint8)
        while True:
            arena = np.empty(self._room, np.uint8)
            needed = slots.find(
                self._base, ids.address, ids.ends_address, now_ns, arena.ctypes.data, len(arena), address_N, length_N, fetched_N, status_N
            )
            if needed <= len(arena):
                break
            if needed > MAX_DECODED_BYTES:
                raise RequestError(f"the features of these {count} ids take {needed:,} bytes; at most {MAX_DECODED_BYTES:,} in one request")
            self._room = 2 * needed
        if (status_N == slots.BUSY).any():
            self._repair()
            status_N[status_N == slots.BUSY] = slots.MISS
        return Found(Packed(address_N, length_N, (arena,)), status_N, fetched_N)

    def put(
        self,
        ids: Ids,
        values: Packed,
        until_N: npt.NDArray[np.int64] | None = None,
        *,
        started_ns: int = FOREVER,
        wait_s: float = 10.0,
    ) -> npt.NDArray[np.uint8]:
        """Insert or replace the values of `ids`; one of no bytes says that there is no such entity. What became of each: of `slots`.

        until_N: monotonic ns up to which each is fresh; by default for ever. started_ns: when the values were asked for; ids invalidated
        since are left alone. wait_s: how long to wait for another writer; all are OVERTAKEN after it.
        """
        result_N = np.full(len(ids), slots.OVERTAKEN, np.uint8)
        until_N = np.full(len(ids), FOREVER, np.int64) if until_N is None else until_N
        with self._writing(wait_s) as may:
            if may:
                now = time.monotonic_ns()
                slots.put(self._base, ids.address, ids.ends_address, values.address_N, values.length_N, started_ns, now, until_N, result_N)
        return result_N

    def invalidate(self, ids: Ids) -> int:
        """Values of `ids` are past their time; how many were held. They stand in if the store fails."""
        with self._writing(10.0) as may:
            return int(slots.invalidate(self._base, ids.address, ids.ends_address, len(ids), time.monotonic_ns())) if may else 0

    def invalidate_all(self) -> None:
        """Every value is past its time."""
        with self._writing(10.0) as may:
            if may:
                slots.invalidate_all(self._base, time.monotonic_ns())

    def clear(self) -> None:
        """Empty the table."""
        with self._writing(10.0) as may:
            if may:
                slots.clear(self._base)

    def figures(self) -> tuple[int, int, int]:
        """Entries, bytes of ids and values, evictions since the table was made."""
        words = self._words
        return int(words[slots.ENTRIES // 8]), int(words[slots.BYTES // 8]), int(words[slots.EVICTIONS // 8])

    def close(self) -> None:
        """Let the memory go; it is freed once no process maps it."""
        self._closed = True
        self._release()

    @contextmanager
    def _writing(self, wait_s: float) -> Iterator[bool]:
        """Whether this process may write now; a table that a dead writer left behind is put in order first."""
        if self._closed or not self._lock.acquire(wait_s):
            yield False
            return
        try:
            if self._words[slots.DIRTY // 8]:
                slots.rebuild(self._base)
            self._words[slots.DIRTY // 8] = 1
            yield True
            self._words[slots.DIRTY // 8] = 0
        finally:
            self._lock.release()

    def _repair(self) -> None:
        with self._writing(0.0):
            pass


class _Lock:
    """Exclusion among threads and processes that ends with the process that holds it: a record lock, which the kernel releases.

    Record locks belong to a process and a file, and closing any descriptor of the file drops them: there is one lock a file in a process.
    """

    _held: ClassVar[dict[tuple[int, int], "_Lock"]] = {}
    _guard = threading.Lock()

    def __init__(self, file: tuple[int, int], fd: int) -> None:
        self._file, self._fd, self._uses = file, os.dup(fd), 0
        self._pid, self._threads = os.getpid(), threading.Lock()

    @classmethod
    def of(cls, fd: int) -> "_Lock":
        """The lock of this file, to be given back with `leave`."""
        status = os.fstat(fd)
        file = (status.st_dev, status.st_ino)
        with cls._guard:
            lock = cls._held.get(file) or cls._held.setdefault(file, cls(file, fd))
            lock._uses += 1
        return lock

    def leave(self, fd: int) -> None:
        """Close a table's descriptor, and with the last one this lock's own."""
        with self._guard, self._threads:
            os.close(fd)
            self._uses -= 1
            if not self._uses:
                os.close(self._fd)
                del self._held[self._file]

    def acquire(self, wait_s: float) -> bool:
        if self._pid != os.getpid():  # a fork: whatever thread held it is not here
            self._pid, self._threads = os.getpid(), threading.Lock()
        end = time.monotonic() + wait_s
        if not self._threads.acquire(timeout=wait_s):
            return False
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno not in {errno.EACCES, errno.EAGAIN} or time.monotonic() >= end:
                    self._threads.release()
                    return False
            time.sleep(WRITER_POLL_S)

    def release(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)
        self._threads.release()


def _memory(size: int) -> int:
    """Descriptor of `size` zeroed bytes that vanish with the last process that has them."""
    try:
        if sys.platform == "linux":
            fd = os.memfd_create("ninerank-features")
            os.ftruncate(fd, size)
        else:
            with tempfile.TemporaryFile() as file:
                file.truncate(size)
                fd = os.dup(file.fileno())
    except OSError as error:
        raise DataError(f"a feature cache of {size:,} bytes cannot be had ({error.strerror})") from None
    return fd


def _up(size: int) -> int:
    return (size + 7) & ~7
