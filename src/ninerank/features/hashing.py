"""XXH64, the stable 64-bit hash of ids (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).

A string is hashed as its UTF-8 bytes, an int64 as its 8 little-endian bytes: any XXH64 gives the same numbers.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.features.native import jit, load_u8, load_u32, load_u64

__all__ = ["hash_bytes", "hash_ints", "hash_strings", "xxh64", "xxh64_int"]

P1, P2 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
P3, P4, P5 = np.uint64(0x165667B19E3779F9), np.uint64(0x85EBCA77C2B2AE63), np.uint64(0x27D4EB2F165667C5)
U1, U7, U11, U12, U18, U23, U27 = (np.uint64(n) for n in (1, 7, 11, 12, 18, 23, 27))
U29, U31, U32, U33, U64 = (np.uint64(n) for n in (29, 31, 32, 33, 64))


@jit
def _rotate(x, bits):  # type: ignore[no-untyped-def]
    return (x << bits) | (x >> (U64 - bits))


@jit
def _round(lane, word):  # type: ignore[no-untyped-def]
    return _rotate(lane + word * P2, U31) * P1


@jit
def _avalanche(h):  # type: ignore[no-untyped-def]
    h = (h ^ (h >> U33)) * P2
    h = (h ^ (h >> U29)) * P3
    return h ^ (h >> U32)


@jit
def xxh64(address, size, seed):  # type: ignore[no-untyped-def]
    """uint64 hash of `size` (int64) bytes at `address` (int64) with `seed` (uint64)."""
    end = address + size
    if size >= 32:
        a, b, c, d = seed + P1 + P2, seed + P2, seed, seed - P1
        while address + 32 <= end:
            a = _round(a, load_u64(address))
            b = _round(b, load_u64(address + 8))
            c = _round(c, load_u64(address + 16))
            d = _round(d, load_u64(address + 24))
            address += 32
        h = _rotate(a, U1) + _rotate(b, U7) + _rotate(c, U12) + _rotate(d, U18)
        h = (h ^ _round(np.uint64(0), a)) * P1 + P4
        h = (h ^ _round(np.uint64(0), b)) * P1 + P4
        h = (h ^ _round(np.uint64(0), c)) * P1 + P4
        h = (h ^ _round(np.uint64(0), d)) * P1 + P4
    else:
        h = seed + P5
    h += np.uint64(size)
    while address + 8 <= end:
        h = _rotate(h ^ _round(np.uint64(0), load_u64(address)), U27) * P1 + P4
        address += 8
    if address + 4 <= end:
        h = _rotate(h ^ (load_u32(address) * P1), U23) * P2 + P3
        address += 4
    while address < end:
        h = _rotate(h ^ (load_u8(address) * P5), U11) * P1
        address += 1
    return _avalanche(h)


@jit
def xxh64_int(value, seed):  # type: ignore[no-untyped-def]
    """uint64 hash of the 8 little-endian bytes of `value` (int64): XXH64 with the one word there is."""
    h = seed + P5 + np.uint64(8)
    return _avalanche(_rotate(h ^ _round(np.uint64(0), np.uint64(value)), U27) * P1 + P4)


@jit
def _fill_ints(values, seed, out):  # type: ignore[no-untyped-def]
    for i in range(values.shape[0]):
        out[i] = xxh64_int(values[i], seed)


@jit
def _fill_strings(data, offsets, seed, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        out[i] = xxh64(data + offsets[i], offsets[i + 1] - offsets[i], seed)


def hash_bytes(data: bytes, seed: int = 0) -> int:
    """XXH64 of `data`.

    >>> hex(hash_bytes(b"abc"))
    '0x44bc2cf5ad770999'
    """
    return int(xxh64(pa.py_buffer(data).address, len(data), np.uint64(seed)))


def hash_ints(values: npt.NDArray[np.int64], seed: int = 0) -> npt.NDArray[np.uint64]:
    """XXH64 of each int64."""
    out = np.empty(len(values), np.uint64)
    _fill_ints(np.ascontiguousarray(values, np.int64), np.uint64(seed), out)
    return out


def hash_strings(values: pa.Array, seed: int = 0) -> npt.NDArray[np.uint64]:
    """XXH64 of each string's UTF-8 bytes, of a string or large_string array; a null hashes as the empty string."""
    out = np.empty(len(values), np.uint64)
    if len(values):
        values = values.cast(pa.large_string()).fill_null("")
        _, ends, data = values.buffers()
        offsets = np.frombuffer(ends, np.int64, len(values) + 1, 8 * values.offset)
        _fill_strings(data.address if data is not None else 0, offsets, np.uint64(seed), out)
    return out
