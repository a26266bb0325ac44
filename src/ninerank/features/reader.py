"""Log files as batches of rows: streaming, shuffled with a seed, split over ranks, resumable at any batch.

An epoch is one sequence of all rows. Rank r of W takes rows N r / W .. N (r + 1) / W of it and cuts them into batches.

    seed None                    files as given, rows in file order
    N <= shuffle_rows            all rows in memory, one permutation an epoch
    N > shuffle_rows             blocks (row groups) in permuted order, then each window of `shuffle_rows` rows permuted by itself

The order depends on (seed, epoch) alone, and every window on its own number, so that `epoch(e, start_batch)` gives what is left of epoch e
without reading what came before where the format can skip it (Parquet, Arrow IPC).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import DataError, NinerankError, nearest
from ninerank.features.checks import RowCheck
from ninerank.features.files import ArrowLog, Dialect, LogFile, ParquetLog, TextLog, expand, format_of
from ninerank.features.sources import criteo
from ninerank.features.sources.libsvm import LibsvmLog
from ninerank.features.spec import FeatureSpec

__all__ = ["FORMATS", "Reader"]

FORMATS = ("auto", "csv", "tsv", "parquet", "arrow", "criteo", "libsvm")
ALL = 1 << 62
DIALECTS = {"csv": Dialect(), "tsv": Dialect(delimiter="\t"), "criteo": criteo.DIALECT}


class Reader:
    """Rows of log files in batches; with a spec, columns are those it reads (and `extra_columns`), of the types it wants, and checked.

    Raises DataError that names the file, and where it applies the column, row (from 0) and value: missing file or column, wrong type,
    empty or truncated file, label outside {0, 1}, number that is not finite.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        spec: FeatureSpec | None = None,
        batch_size: int = 4096,
        format: str = "auto",  # noqa: A002 (the word users know; `format()` is not needed here)
        seed: int | None = None,
        shuffle_rows: int = 1 << 20,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        extra_columns: Sequence[str] = (),
    ) -> None:
        if batch_size < 1 or shuffle_rows < 1:
            raise DataError(f"batch_size {batch_size} and shuffle_rows {shuffle_rows} must be at least 1")
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of world size {world_size}; ranks are 0 .. world_size - 1")
        if seed is not None and seed < 0:
            raise DataError(f"seed {seed}: a seed is at least 0")
        if format not in FORMATS:
            raise DataError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
        self.spec, self.batch_size, self.seed, self.shuffle_rows = spec, batch_size, seed, shuffle_rows
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._check = RowCheck(spec, tuple(extra_columns))
        self.files = [self._open(path, format) for path in expand(paths)]
        for file in self.files:
            self._check.columns_of(file)
        self._counted: int | None = None
        self._memory: pa.RecordBatch | None = None

    @property
    def known_rows(self) -> int | None:
        """Rows of all files and ranks, if that takes no reading (text does)."""
        sizes = [size for file in self.files for size in file.block_rows]
        known = [size for size in sizes if size is not None]
        return self._counted if self._counted is not None or len(known) < len(sizes) else sum(known)

    @property
    def num_rows(self) -> int:
        """Rows of all files and ranks; text is read once to count them (and kept, if a shuffle will want it in memory)."""
        if self._counted is None:
            known = self.known_rows
            self._counted = self._count() if known is None else known
        return self._counted

    @property
    def num_batches(self) -> int:
        """Batches of this rank in one epoch."""
        if self.drop_last:
            return self.num_rows // self.world_size // self.batch_size
        first, last = self._range()
        return -(-(last - first) // self.batch_size)

    def epoch(self, epoch: int = 0, start_batch: int = 0) -> Iterator[pa.RecordBatch]:
        """Batches `start_batch`, ... of this rank in `epoch`; raises DataError if there is no row at all."""
        if epoch < 0 or start_batch < 0:
            raise DataError(f"epoch {epoch}, start_batch {start_batch}: both are at least 0")
        streams = self.seed is None and self.world_size == 1 and not self.drop_last
        first, last = self._range() if not streams else (0, ALL)
        if not streams and self.num_rows == 0:
            raise DataError(f"{self._names()}: no rows; a log holds at least one")
        start = first + start_batch * self.batch_size
        if self.drop_last:
            last = first + self.num_batches * self.batch_size
        if self.seed is None:
            rows = self._stream(self._blocks(None), start, last)
            batches = _recut(rows, self.batch_size)
        elif self.num_rows <= self.shuffle_rows:
            order = self._rng(epoch).permutation(self.num_rows)
            table = self._in_memory()
            batches = (_take(table, order[at : min(at + self.batch_size, last)]) for at in range(start, last, self.batch_size))
        else:
            window = start_batch * self.batch_size // self.shuffle_rows
            begin = first + window * self.shuffle_rows
            rows = self._shuffled(epoch, window, self._stream(self._blocks(self._rng(epoch)), begin, last))
            batches = _recut(rows, self.batch_size, skip=start - begin)
        count = 0
        for batch in batches:
            count += batch.num_rows
            yield batch
        if streams and count == 0 and start_batch == 0:
            raise DataError(f"{self._names()}: no rows; a log holds at least one")

    def _open(self, path: Path, asked: str) -> LogFile:
        kind = format_of(path) if asked == "auto" else asked
        if kind is None:
            raise DataError(f"{path}: its ending tells no format; say format: {', '.join(FORMATS[1:])}")
        if kind == "parquet":
            return ParquetLog(path)
        if kind == "arrow":
            return ArrowLog(path)
        if kind == "libsvm":
            return LibsvmLog(path, self._check.libsvm_numbers())
        return TextLog(path, DIALECTS[kind], self._check.text_types())

    def _range(self) -> tuple[int, int]:
        return self.num_rows * self.rank // self.world_size, self.num_rows * (self.rank + 1) // self.world_size

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed or 0, *key])

    def _names(self) -> str:
        return ", ".join(str(file.path) for file in self.files[:3]) + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")

    def _blocks(self, rng: np.random.Generator | None) -> list[tuple[LogFile, int]]:
        blocks = [(file, block) for file in self.files for block in range(len(file.block_rows))]
        return blocks if rng is None else [blocks[i] for i in rng.permutation(len(blocks))]

    def _stream(self, blocks: Sequence[tuple[LogFile, int]], start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Checked rows start .. stop of the blocks one after another."""
        at = 0
        for file, block in blocks:
            size = file.block_rows[block]
            if size is not None and at + size <= start:
                at += size
                continue
            if at >= stop:
                return
            first_row = sum(rows or 0 for rows in file.block_rows[:block])
            for batch in file.read(block, self._check.columns_of(file)):
                begin, end = max(start - at, 0), min(stop - at, batch.num_rows)
                if begin < end:
                    yield self._check(batch.slice(begin, end - begin), file.path, first_row + begin)
                at, first_row = at + batch.num_rows, first_row + batch.num_rows

    def _shuffled(self, epoch: int, window: int, rows: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for held in _recut(rows, self.shuffle_rows):
            yield _take(held, self._rng(epoch, self.rank, window).permutation(held.num_rows))
            window += 1

    def _count(self) -> int:
        count = 0
        held: list[pa.RecordBatch] = []
        for batch in self._stream(self._blocks(None), 0, ALL):
            count += batch.num_rows
            if self.seed is None or count > self.shuffle_rows:
                held = []
            else:
                held.append(batch)
        if held:
            self._memory = _joined(held)
        return count

    def _in_memory(self) -> pa.RecordBatch:
        if self._memory is None:
            self._memory = _joined(list(self._stream(self._blocks(None), 0, ALL)))
        return self._memory


def _joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    try:
        return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    except (pa.ArrowException, IndexError) as error:
        raise DataError(f"rows cannot be joined ({error}); a smaller batch_size or shuffle_rows may help") from None


def _take(rows: pa.RecordBatch, order: npt.NDArray[np.int64]) -> pa.RecordBatch:
    try:
        return rows.take(pa.array(order))
    except pa.ArrowException as error:
        raise NinerankError(f"rows cannot be shuffled ({error}); a smaller shuffle_rows may help") from None


def _recut(rows: Iterator[pa.RecordBatch], size: int, skip: int = 0) -> Iterator[pa.RecordBatch]:
    """The same rows, the first `skip` left out, in batches of `size`, the last one shorter."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in rows:
        at = min(skip, batch.num_rows)
        skip -= at
        while at < batch.num_rows:
            part = batch.slice(at, size - count)
            held.append(part)
            at, count = at + part.num_rows, count + part.num_rows
            if count == size:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)
