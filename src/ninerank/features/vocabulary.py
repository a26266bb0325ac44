"""Compiled vocabularies: open-addressing tables from id to row, at most half full, linear probing.

A slot is a few int64s that share a cache line: (id, row) for int64 ids, (XXH64, row, where, size) for strings, row 0 where it is free.
The bytes of a string are compared too, so that two strings of one hash never share a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.features.hashing import hash_ints, hash_strings, xxh64, xxh64_int
from ninerank.features.native import jit, load_i64, load_u8, load_u64

__all__ = ["CompiledVocabulary", "find_int", "find_string"]

SEED = np.uint64(0)


@jit
def _place(hashes, order):  # type: ignore[no-untyped-def]
    """order[slot] = row of the id there, or 0."""
    mask = np.int64(order.shape[0] - 1)
    for i in range(hashes.shape[0]):
        slot = np.int64(hashes[i]) & mask
        while order[slot] != 0:
            slot = (slot + 1) & mask
        order[slot] = i + 1


@jit
def _same(a, b, size):  # type: ignore[no-untyped-def]
    while size >= 8:
        if load_u64(a) != load_u64(b):
            return False
        a, b, size = a + 8, b + 8, size - 8
    while size > 0:
        if load_u8(a) != load_u8(b):
            return False
        a, b, size = a + 1, b + 1, size - 1
    return True


@jit
def find_int(value, slots, mask):  # type: ignore[no-untyped-def]
    """Row of int64 `value`, 0 if it has none; `slots` is the address of the first slot."""
    slot = np.int64(xxh64_int(value, SEED)) & mask
    while True:
        at = slots + 16 * slot
        row = load_i64(at + 8)
        if row == 0 or load_i64(at) == value:
            return row
        slot = (slot + 1) & mask


@jit
def find_string(address, size, slots, mask):  # type: ignore[no-untyped-def]
    """Row of the string of `size` bytes at `address`, 0 if it has none; `slots` is the address of the first slot."""
    h = np.int64(xxh64(address, size, SEED))
    slot = h & mask
    while True:
        at = slots + 32 * slot
        row = load_i64(at + 8)
        if row == 0 or (load_i64(at) == h and load_i64(at + 24) == size and _same(address, load_i64(at + 16), size)):
            return row
        slot = (slot + 1) & mask


@dataclass(frozen=True, eq=False)
class CompiledVocabulary:
    """Slots of one vocabulary, S of them, a power of two. Kernels read slots and strings by address: the object must outlive their calls.

    slots: int64 (S, 2) or (S, 4). data: UTF-8 bytes of the known strings.
    """

    slots: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]

    @classmethod
    def build(cls, values: Sequence[int] | Sequence[str], dtype: str) -> "CompiledVocabulary":
        """Row i + 1 for `values[i]`; values are distinct."""
        order = np.zeros(1 << max(4, (2 * len(values) - 1).bit_length()), np.int64)
        data = np.zeros(1, np.uint8)
        if dtype == "int64":
            known = np.array(values, np.int64)
            fields = [known]
            hashes = hash_ints(known)
        else:
            strings = pa.array(values, pa.large_string())
            hashes = hash_strings(strings)
            _, offsets, text = strings.buffers()
            if text is not None and text.size:
                data = np.frombuffer(text, np.uint8).copy()
            bounds = np.frombuffer(offsets, np.int64, len(values) + 1) if values else np.zeros(1, np.int64)
            fields = [hashes.view(np.int64), bounds[:-1] + data.ctypes.data, np.diff(bounds)]
        _place(hashes, order)
        taken = np.flatnonzero(order)
        slots = np.zeros((len(order), 1 + len(fields)), np.int64)
        slots[taken, 1] = order[taken]
        for column, field in zip((0, 2, 3), fields, strict=False):
            slots[taken, column] = field[order[taken] - 1]
        return cls(slots, data)

    @property
    def addresses(self) -> tuple[int, int]:
        """Address of the slots and mask, as `find_int` and `find_string` take them."""
        return self.slots.ctypes.data, len(self.slots) - 1
