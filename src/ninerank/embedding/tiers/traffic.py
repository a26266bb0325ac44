"""Rows between the backing store and the device: read ahead, written behind, always in order.

All work on the backing store happens on one thread, first come, first served: a read sees every write asked for before it. A row that
was read ahead is good until it is written back; from then on it is read anew. So a batch that updates the rows of the next one needs no
lock: when the next batch begins such a row is still on the device, or else its write-back is in the line before the read.

K moved rows, W words of a record.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.tiers.records import Words, gather, scatter

__all__ = ["Traffic"]

MAX_WRITES = 2
# Threads that touch a mapped file: while one waits for its page to come from the disk, the others ask for theirs.
MOVERS = 16
ROWS_PER_MOVER = 128


@dataclass
class _Staged:
    """Rows (K,) read ahead, rising, and which of them have not been written back since."""

    rows: Ints
    is_good: npt.NDArray[np.bool_]
    reading: "Future[Tensor]"

    def holds(self, rows: Ints) -> npt.NDArray[np.bool_]:
        """Which of distinct rows are here and good."""
        return np.isin(rows, self.rows[self.is_good], assume_unique=True)


class Traffic:
    """Reads and writes of one table's records. device: what rows are staged for; its transfers start from pinned memory.

    is_threaded: work on a background thread; otherwise each call does its work at once, and `announce` nothing. waits_for_disk: each row
    may have to come from the disk first, so that many are sent for at once.
    """

    def __init__(self, words: Words, device: torch.device, *, is_threaded: bool, waits_for_disk: bool, name: str) -> None:
        self._words, self._device = words, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"ninerank-tier-{name}") if is_threaded else None
        self._movers = ThreadPoolExecutor(MOVERS, thread_name_prefix=f"ninerank-tier-{name}-disk") if waits_for_disk else None
        self._writes: deque[Future[None]] = deque()
        self._staged: _Staged | None = None
        self.rows_read = self.rows_written = self.rows_prefetched = 0

    def announce(self, rows: Ints) -> None:
        """Begin to read distinct rows, rising, that will be taken soon; what was announced before is dropped."""
        if self._thread is not None:
            self._staged = _Staged(rows, np.ones(len(rows), np.bool_), self._submit(self._read, rows))

    def take(self, rows: Ints) -> Tensor:
        """Records (K, W) of distinct rows, rising, on the host."""
        staged = self._staged
        is_good = staged.holds(rows) if staged is not None else np.zeros(len(rows), np.bool_)
        num_good = int(np.count_nonzero(is_good))
        if staged is None or num_good == 0:
            read: Tensor = self._submit(self._read, rows).result()
            return read
        self.rows_prefetched += num_good
        if num_good == len(rows) == len(staged.rows):
            self._staged = None
            return staged.reading.result()
        late = self._submit(self._read, rows[~is_good])
        out, good = self._staging(len(rows)), torch.from_numpy(is_good)
        out[good] = staged.reading.result()[torch.from_numpy(np.searchsorted(staged.rows, rows[is_good]))]
        out[~good] = late.result()
        return out

    def put(self, rows: Ints, records_KW: Tensor) -> None:
        """Write records, on the device, back to distinct rows; they are there for every later `take`."""
        if self._staged is not None:
            self._staged.is_good &= ~np.isin(self._staged.rows, rows, assume_unique=True)
        ready: torch.Event | None = None
        if records_KW.device.type != "cpu":
            on_host = self._staging(len(rows))
            on_host.copy_(records_KW, non_blocking=True)
            ready = torch.Event(records_KW.device)
            ready.record()
            records_KW = on_host
        self._writes.append(self._submit(self._write, rows, records_KW, ready))
        while len(self._writes) > MAX_WRITES:
            self._writes.popleft().result()

    def wait(self) -> None:
        """Return when everything that was put is written."""
        while self._writes:
            self._writes.popleft().result()

    def drop(self) -> None:
        """Forget what was announced, and wait for the writes: the records are about to be replaced."""
        if self._staged is not None:
            self._staged.reading.result()
            self._staged = None
        self.wait()

    def close(self) -> None:
        """Finish what was begun and end the thread."""
        self._staged = None
        if self._thread is not None:
            self._thread.shutdown()
        if self._movers is not None:
            self._movers.shutdown()
        self.wait()

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        if self._thread is not None:
            return self._thread.submit(work, *arguments)
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done

    def _staging(self, count: int) -> Tensor:
        return torch.empty(count, self._words.shape[1], dtype=torch.int32, pin_memory=self._device.type != "cpu")

    def _move(self, copy: Callable[[Words, Ints, Words], None], rows: Ints, records: Words) -> None:
        parts = len(rows) // ROWS_PER_MOVER
        if self._movers is None or parts < 2:
            copy(self._words, rows, records)
            return
        parts = min(parts, MOVERS)
        for _ in self._movers.map(copy, [self._words] * parts, np.array_split(rows, parts), np.array_split(records, parts)):
            pass

    def _read(self, rows: Ints) -> Tensor:
        out = self._staging(len(rows))
        self._move(gather, rows, out.numpy())
        self.rows_read += len(rows)
        return out

    def _write(self, rows: Ints, records_KW: Tensor, ready: "torch.Event | None") -> None:
        if ready is not None:
            ready.synchronize()
        self._move(scatter, rows, records_KW.numpy())
        self.rows_written += len(rows)
