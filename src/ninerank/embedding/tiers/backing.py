"""Records of a whole table: in RAM, or in a memory-mapped file.

Both are an int32 array (R, W) that rows are gathered from and scattered to. On disk the system decides which pages lie in RAM and gives
them back under pressure: the process itself holds none of the table. The start is written by `pwrite`, block by block and without holes, so
that a full disk is an error then, and not a fault of the mapping later.
"""

import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ninerank.embedding.tiers.records import Record, RecordColumn, Words
from ninerank.embedding.tiers.scratch import OWNER, ROWS, Owner, ScratchDirectory
from ninerank.errors import CheckpointError, SpecError
from ninerank.fusion.kernels import storage

__all__ = ["Backing", "DiskBacking", "HostBacking", "kept_columns"]


class Backing(Protocol):
    """Records (R, W) of all rows."""

    words: Words

    def write(self, first_row: int, block: Words) -> None:
        """Replace the records from `first_row` on."""

    def expect(self, *, in_order: bool) -> None:
        """Say how records will be touched from now on: one after the other, or here and there."""

    def close(self, *, keep: bool) -> None:
        """Give the place up, or keep what lies on disk."""


class HostBacking:
    """Records in RAM, in huge pages where the system has them."""

    def __init__(self, num_rows: int, num_words: int, start: Iterable[tuple[int, Words]]) -> None:
        self.words: Words = storage.zeros((num_rows, num_words), torch.int32).numpy()
        for first, block in start:
            self.write(first, block)

    def write(self, first_row: int, block: Words) -> None:
        self.words[first_row : first_row + len(block)] = block

    def expect(self, *, in_order: bool) -> None:
        """RAM is as fast either way."""

    def close(self, *, keep: bool) -> None:
        """RAM goes with the last reference to it."""


class DiskBacking:
    """Records in a file of a scratch directory; raises SpecError where it does not fit on the disk."""

    def __init__(self, scratch: ScratchDirectory, num_rows: int, num_words: int, start: Iterable[tuple[int, Words]]) -> None:
        self._scratch = scratch
        try:
            self._open((num_rows, num_words), start)
        except OSError as error:
            scratch.finish(keep=False)
            raise SpecError(f"table {scratch.owner.table!r}: {scratch.rows} cannot be written ({error.strerror})") from None
        except BaseException:
            scratch.finish(keep=False)
            raise

    def _open(self, shape: tuple[int, int], start: Iterable[tuple[int, Words]]) -> None:
        num_bytes, free = shape[0] * shape[1] * 4, shutil.disk_usage(self._scratch.path).free
        if num_bytes > free:
            raise SpecError(f"table {self._scratch.owner.table!r} takes {num_bytes} bytes; {self._scratch.path} has {free} left")
        descriptor = os.open(self._scratch.draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(descriptor, num_bytes)
            for first, block in start:
                _write(descriptor, first, block)
            memory = mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        self._scratch.draft.replace(self._scratch.rows)  # without fsync: nobody reads it after a crash
        self._memory, self._is_in_order = memory, True
        self.expect(in_order=False)
        self.words: Words = np.frombuffer(memory, np.int32).reshape(shape)

    def write(self, first_row: int, block: Words) -> None:
        descriptor = os.open(self._scratch.rows, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write(descriptor, first_row, block)
        finally:
            os.close(descriptor)

    def expect(self, *, in_order: bool) -> None:
        """The system reads ahead where that helps: a pass over a cold file took a tenth of the time. Single pages bring no others."""
        if in_order != self._is_in_order and hasattr(mmap, "MADV_RANDOM"):
            self._memory.madvise(mmap.MADV_NORMAL if in_order else mmap.MADV_RANDOM)
        self._is_in_order = in_order

    def close(self, *, keep: bool) -> None:
        self._scratch.finish(keep=keep)


def _write(descriptor: int, first_row: int, block: Words) -> None:
    data, place = memoryview(np.ascontiguousarray(block).data).cast("B"), first_row * block.shape[1] * 4
    while data:
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def kept_columns(path: str | Path) -> dict[str, Tensor]:
    """Values and states by name, mapped from a directory `<table>.tier` that was kept; changes to them do not reach the file.

    Raises CheckpointError for a directory that no closed table left, and SpecError for an owner.json that is none.
    """
    directory = Path(path)
    if not (directory / OWNER).is_file() or not (directory / ROWS).is_file():
        raise CheckpointError(f"{directory}: holds no kept table ({OWNER} and {ROWS} are needed)")
    owner = Owner.load(directory / OWNER)
    if owner.status != "kept":
        raise CheckpointError(f"{directory}: is scratch of a run that did not close it; only what was kept can be read")
    columns = tuple(RecordColumn(c.name, c.first_word, c.width, getattr(torch, c.dtype)) for c in owner.columns)
    record = Record(columns)
    needed, met = owner.num_rows * record.num_bytes, (directory / ROWS).stat().st_size
    if met != needed:
        raise CheckpointError(f"{directory / ROWS}: has {met} bytes, {needed} are needed")
    words = np.memmap(directory / ROWS, np.int32, mode="c", shape=(owner.num_rows, record.num_words))
    return record.split(torch.from_numpy(np.asarray(words)))
