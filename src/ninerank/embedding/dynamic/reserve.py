"""Arrays that grow without being copied: address space is reserved at once, memory comes page by page as rows are touched.

The rows stay one contiguous (V, D) array, as lookup and update kernels want it. Only where the reservation runs out (fewer rows
reserved than came, or a machine that refuses to reserve) are rows moved, into one twice as large; each block's old pages are
returned as soon as it is copied, so that the move needs one block more than the data, not twice the data.
"""

import logging
import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Region", "RowArray"]

logger = logging.getLogger(__name__)

# Pages of 2 MiB spare a random reader most address translations; the first bytes stay on small pages, for the sake of small tables.
SMALL_PAGES_BYTES = 4 << 20
MOVE_BYTES = 16 << 20
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Region:
    """Zeroed anonymous memory of which only touched pages are held."""

    def __init__(self, num_bytes: int) -> None:
        size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self.memory = mmap.mmap(-1, size, flags=_ANONYMOUS | _NO_RESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"cannot reserve {size} bytes of address space: {error}") from None
        self.num_bytes = size
        if size > SMALL_PAGES_BYTES:
            self._advise("MADV_HUGEPAGE", SMALL_PAGES_BYTES, size - SMALL_PAGES_BYTES)

    def release(self, first: int, stop: int) -> None:
        """Give the whole pages within bytes `first ... stop` back; what is read there next is zero, or stale where that is not offered."""
        low, high = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if high > low:
            self._advise("MADV_DONTNEED", low, high - low)

    def _advise(self, name: str, start: int, length: int) -> None:
        advice = getattr(mmap, name, None)
        if advice is None:
            return
        try:
            self.memory.madvise(advice, start, length)
        except OSError as error:
            logger.debug("%s is not to be had here: %s", name, error)


class RowArray:
    """(V, width) array of one dtype, or (V,) records where width is 0, of which rows `0 ... used` have been touched.

    `rows` is the reserved array; it is another object after a move, so that views must not be kept over `ensure`.
    """

    def __init__(self, num_rows: int, width: int, dtype: npt.DTypeLike) -> None:
        self._dtype, self._width = np.dtype(dtype), width
        self.row_bytes = self._dtype.itemsize * max(width, 1)
        self._region, self.rows = self._reserve(num_rows, least_rows=1)

    @property
    def num_rows(self) -> int:
        """Rows there is address space for."""
        return len(self.rows)

    def ensure(self, num_rows: int, used: int) -> None:
        """Have room for `num_rows`; the first `used` rows keep their content."""
        if num_rows <= self.num_rows:
            return
        old_region, old = self._region, self.rows
        self._region, self.rows = self._reserve(max(num_rows, 2 * len(old)), least_rows=num_rows)
        block = max(1, MOVE_BYTES // self.row_bytes)
        for first in range(0, used, block):
            stop = min(first + block, used)
            self.rows[first:stop] = old[first:stop]
            old_region.release(first * self.row_bytes, stop * self.row_bytes)
        logger.info("moved %d rows of %d bytes into a reservation of %d rows", used, self.row_bytes, self.num_rows)

    def _reserve(self, num_rows: int, *, least_rows: int) -> tuple[Region, npt.NDArray[Any]]:
        try:
            region = Region(num_rows * self.row_bytes)
        except MemoryError:
            if num_rows <= least_rows:
                raise
            return self._reserve(max(least_rows, num_rows // 2), least_rows=least_rows)
        flat = np.frombuffer(region.memory, self._dtype, count=num_rows * max(self._width, 1))
        return region, flat.reshape(num_rows, self._width) if self._width else flat
