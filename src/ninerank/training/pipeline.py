"""From the files of a split to batches: read, transformed, checked; kept in memory where they fit.

The order of the training rows is a pure function of (seed, epoch) and of the recipe: a split that fits `cache_bytes` is permuted as
a whole, a larger one is shuffled by the reader. Which of the two it is does not depend on the machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ninerank.embedding.collection import EmbeddingCollection
from ninerank.errors import DataError
from ninerank.features.batch import Batch
from ninerank.features.fit import fit
from ninerank.features.reader import Reader
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.training.cache import PackedRows, batch_bytes
from ninerank.training.recipe import DataConfig

__all__ = ["Split", "fit_spec", "permutation"]


def permutation(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    """Order of an epoch's rows: int64 (num_rows,), the one by which `Reader` takes rows that it holds in memory."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_rows))


def fit_spec(spec: FeatureSpec, paths: tuple[Path, ...], data: DataConfig, on_rows: Callable[[int], None] = lambda _: None) -> FeatureSpec:
    """The spec with what the training rows (the first `data.fit_rows` of them) teach; a fitted spec stays as it is."""
    return (
        spec
        if spec.is_fitted
        else fit(spec, _head(Reader(paths, format=data.format, spec=spec, batch_size=1 << 16), data.fit_rows, on_rows))
    )


def _head(reader: Reader, num_rows: int | None, on_rows: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
    left = num_rows
    for batch in reader.epoch(0):
        part = batch.slice(0, left)
        on_rows(part.num_rows)
        yield part
        if left is not None:
            left -= part.num_rows
            if left == 0:
                return


class Split:
    """Batches of one split; `data.batch_size` rows of all processes make one, process `rank` of `world_size` sees its share of them.

    Rows in memory: a process takes its part of every batch of the one order that all know, so that the batches are those of one process.
    A split that is streamed: a process reads its own part of the rows, in batches of its share of `batch_size`. Either way all processes
    have the same number of batches, of the same sizes: where rows are missing the last one is repeated, as `Batch.padding`.
    training: rows are shuffled, and a last batch that is not full is left out, if the recipe says so. on_rows: told of rows as they are
    read into memory. Raises DataError for rows that are wrong, or too few.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        data: DataConfig,
        spec: FeatureSpec,
        *,
        embedding: EmbeddingCollection,
        training: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        on_rows: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.batch_size = data.batch_size
        self.shuffle = training and data.shuffle
        self.drop_last = training and data.drop_last
        self.seed = seed
        self._rank, self._world_size = rank, world_size
        self._transform = Transform(spec)
        self._check = embedding.check
        shared = partial(Reader, paths, format=data.format, spec=spec)
        self._rows = self._load(shared(batch_size=data.batch_size), data.cache_bytes, on_rows)
        self._own_size = -(-data.batch_size // world_size)
        self._reader = shared(batch_size=self._own_size, seed=seed if self.shuffle else None, rank=rank, world_size=world_size)
        self.num_rows = self._reader.num_rows if self._rows is None else self._rows.num_rows
        # A streamed part that has a row more than others counts for all: their batches are filled up.
        self._longest = -(-self.num_rows // world_size) if self._rows is None else self.num_rows
        if self.num_batches == 0 or (self._rows is None and self.num_rows < world_size):
            least = max(world_size if self._rows is None else 1, self.batch_size if self.drop_last else 1)
            raise DataError(f"{', '.join(map(str, paths))}: {self.num_rows} rows make no batch; at least {least} are needed")

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, of every process."""
        if self._rows is None:
            if self.drop_last:
                return self.num_rows // self._world_size // self._own_size
            return -(-self._longest // self._own_size)
        full, rest = divmod(self.num_rows, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def in_memory(self) -> bool:
        return self._rows is not None

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Batches `start_batch`, `start_batch + 1`, ... of an epoch, on the CPU."""
        if self._rows is None:
            batches = self._streamed(epoch, start_batch)
        else:
            batches = self._from_memory(self._rows, epoch, start_batch)
        return islice(batches, max(0, self.num_batches - start_batch))

    def _load(self, reader: Reader, limit_bytes: int, on_rows: Callable[[int], None]) -> PackedRows | None:
        """The transformed rows if they fit; where the files tell their number of rows, the first batch tells whether a try is worth it."""
        if all(rows is not None for file in reader.files for rows in file.block_rows):
            first = next(self._transformed(reader.epoch(0)))
            if batch_bytes(first) / first.num_rows * reader.num_rows > 1.1 * limit_bytes:
                return None
        return PackedRows.within(self._transformed(reader.epoch(0)), limit_bytes, on_rows)

    def _transformed(self, rows: Iterator[pa.RecordBatch]) -> Iterator[Batch]:
        for part in rows:
            batch = self._transform.batch(part, labels=True)
            self._check(batch)
            yield batch

    def _streamed(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        """This process's own rows; where others have more, its last row stands in."""
        last: pa.RecordBatch | None = None
        rows = self._reader.epoch(epoch, start_batch)
        for number in range(start_batch, self.num_batches):
            wanted = min(self._own_size, self._longest - number * self._own_size)
            part = next(rows, None)
            if self._world_size == 1:
                if part is None:
                    return
                padding = 0
            elif part is None:
                # The one row more of another process made a batch of its own.
                last = last or next(self._reader.epoch(epoch, max(0, number - 1)))
                part, padding = last.take(pa.array([last.num_rows - 1] * wanted)), wanted
            else:
                padding = max(0, wanted - part.num_rows)
                last = part
                if padding:
                    part = part.take(pa.array([*range(part.num_rows), *[part.num_rows - 1] * padding]))
            yield replace(next(self._transformed(iter([part]))), padding=padding)

    def _from_memory(self, rows: PackedRows, epoch: int, start_batch: int) -> Iterator[Batch]:
        order = permutation(rows.num_rows, self.seed, epoch) if self.shuffle else torch.arange(rows.num_rows)
        for first in range(start_batch * self.batch_size, self.num_rows, self.batch_size):
            batch = order[first : first + self.batch_size]
            size = -(-batch.numel() // self._world_size)
            own = torch.arange(self._rank * size, (self._rank + 1) * size)
            padding = int((own >= batch.numel()).sum())
            yield replace(rows.take(batch[own.clamp(max=batch.numel() - 1)]), padding=padding)
