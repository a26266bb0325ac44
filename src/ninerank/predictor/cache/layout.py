"""Kernels of the packed value (its layout is in `value`): rows of Arrow columns to values, values to columns.

A kernel reads nothing before it knows that it lies within the value: `_fits` is what stands between damaged bytes and memory.

Shape legend: N values, C columns.
"""

from enum import IntEnum
from typing import Final

import numpy as np

from ninerank.features.hashing import xxh64
from ninerank.features.native import jit, load_i32, load_i64, load_u8, load_u32
from ninerank.predictor.cache.native import copy, store_i64, store_u8, store_u32

__all__ = [
    "BAD",
    "HEADER_BYTES",
    "MAX_VALUE_BYTES",
    "PLACE_FIELDS",
    "SOURCE_FIELDS",
    "Kind",
    "check_rows",
    "fixed_bytes",
    "measure_columns",
    "measure_rows",
    "not_ascii",
    "read_columns",
    "write_rows",
]

HEADER_BYTES: Final = 32
MAX_VALUE_BYTES: Final = 1 << 20
SOURCE_FIELDS: Final = 6
MAGIC: Final = int.from_bytes(b"9RV\x01", "little")
MAGIC_MASK: Final = 0xFFFFFF  # without the format version
BAD: Final = ("", "garbage", "truncated", "schema", "version")
GARBAGE, TRUNCATED, SCHEMA, VERSION = 1, 2, 3, 4
LENGTH_AT, DIGEST_AT, EVENT_AT, CHECKSUM_AT = 4, 8, 16, 24
VALID, OFFSET, DATA, ENDS, INNER, INNER_OFFSET = range(SOURCE_FIELDS)
PLACE_FIELDS: Final = 6
VALID_PLACE, ENDS_PLACE, INNER_PLACE, DATA_PLACE, DATA_BYTES, ELEMENTS = range(PLACE_FIELDS)


class Kind(IntEnum):
    """How a column's values lie: in the fixed part up to FLOAT64, behind it from STRING on."""

    INT64 = 0
    FLOAT64 = 1
    STRING = 2
    INT64S = 3
    STRINGS = 4


FLOAT64, STRING, INT64S = int(Kind.FLOAT64), int(Kind.STRING), int(Kind.INT64S)


def fixed_bytes(num_columns: int) -> int:
    """Bytes of the fixed part."""
    return 8 * ((num_columns + 63) // 64) + 8 * num_columns


@jit
def _fixed(num_columns):  # type: ignore[no-untyped-def]
    return 8 * ((num_columns + 63) // 64) + 8 * num_columns


@jit
def _bit(address, index):  # type: ignore[no-untyped-def]
    return (np.int64(load_u8(address + (index >> 3))) >> (index & 7)) & 1


@jit
def _is_valid(source_CK, column, row):  # type: ignore[no-untyped-def]
    valid = source_CK[column, VALID]
    return valid == 0 or _bit(valid, source_CK[column, OFFSET] + row) != 0


@jit
def _range(source_CK, column, row):  # type: ignore[no-untyped-def]
    at = source_CK[column, ENDS] + 4 * (source_CK[column, OFFSET] + row)
    return np.int64(load_i32(at)), np.int64(load_i32(at + 4))


@jit
def _inner_end(source_CK, column, element):  # type: ignore[no-untyped-def]
    return np.int64(load_i32(source_CK[column, INNER] + 4 * (source_CK[column, INNER_OFFSET] + element)))


@jit
def _variable_bytes(kind, source_CK, column, row):  # type: ignore[no-untyped-def]
    start, end = _range(source_CK, column, row)
    if kind == STRING:
        return end - start
    if kind == INT64S:
        return 8 * (end - start)
    if end == start:
        return np.int64(0)
    return 4 * (end - start) + _inner_end(source_CK, column, end) - _inner_end(source_CK, column, start)


@jit
def measure_rows(kind_C, source_CK, length_N):  # type: ignore[no-untyped-def]
    """Bytes of each row's value, into length_N."""
    fixed = HEADER_BYTES + _fixed(kind_C.shape[0])
    for row in range(length_N.shape[0]):
        total = np.int64(fixed)
        for column in range(kind_C.shape[0]):
            if kind_C[column] >= STRING and _is_valid(source_CK, column, row):
                total += _variable_bytes(kind_C[column], source_CK, column, row)
        length_N[row] = (total + 7) & ~7


@jit
def write_rows(kind_C, source_CK, digest, event_N, address_N, length_N):  # type: ignore[no-untyped-def]
    """Values of `measure_rows`' lengths into zeroed memory at address_N."""
    num_columns = kind_C.shape[0]
    words = 8 * ((num_columns + 63) // 64)
    for row in range(address_N.shape[0]):
        base = address_N[row]
        variable = base + HEADER_BYTES + _fixed(num_columns)
        at = variable
        for column in range(num_columns):
            if not _is_valid(source_CK, column, row):
                continue
            bit = base + HEADER_BYTES + (column >> 3)
            store_u8(bit, np.int64(load_u8(bit)) | (1 << (column & 7)))
            field = base + HEADER_BYTES + words + 8 * column
            kind = kind_C[column]
            if kind <= FLOAT64:
                store_i64(field, load_i64(source_CK[column, DATA] + 8 * (source_CK[column, OFFSET] + row)))
                continue
            start, end = _range(source_CK, column, row)
            store_u32(field, at - variable)
            store_u32(field + 4, end - start)
            if kind == STRING:
                copy(at, source_CK[column, DATA] + start, end - start)
            elif kind == INT64S:
                copy(at, source_CK[column, DATA] + 8 * (source_CK[column, INNER_OFFSET] + start), 8 * (end - start))
            elif end > start:
                first = _inner_end(source_CK, column, start)
                for element in range(start, end):
                    size = _inner_end(source_CK, column, element + 1) - _inner_end(source_CK, column, element)
                    store_u32(at + 4 * (element - start), size)
                copy(at + 4 * (end - start), source_CK[column, DATA] + first, _inner_end(source_CK, column, end) - first)
            at += _variable_bytes(kind, source_CK, column, row)
        store_u32(base, MAGIC)
        store_u32(base + LENGTH_AT, length_N[row])
        store_i64(base + DIGEST_AT, np.int64(digest))
        store_i64(base + EVENT_AT, event_N[row])
        store_i64(base + CHECKSUM_AT, _checksum(base, length_N[row]))


@jit
def _checksum(base, length):  # type: ignore[no-untyped-def]
    key = xxh64(base, np.int64(CHECKSUM_AT), np.uint64(0))
    return np.int64(xxh64(base + HEADER_BYTES, length - HEADER_BYTES, key))


@jit
def _fits(kind_C, digest, base, length):  # type: ignore[no-untyped-def]
    """Whether a value of `length` > 0 bytes may be read: what is wrong with it, 0 for nothing. The checksum is not looked at."""
    num_columns = kind_C.shape[0]
    if length < HEADER_BYTES:
        return TRUNCATED if length >= 4 and np.int64(load_u32(base)) == MAGIC else GARBAGE
    magic = np.int64(load_u32(base))
    if magic & MAGIC_MASK != MAGIC & MAGIC_MASK:
        return GARBAGE
    if magic != MAGIC:
        return VERSION
    if np.int64(load_u32(base + LENGTH_AT)) != length:
        return TRUNCATED if np.int64(load_u32(base + LENGTH_AT)) > length else GARBAGE
    if load_i64(base + DIGEST_AT) != digest:
        return SCHEMA
    if length > MAX_VALUE_BYTES:
        return GARBAGE
    fixed = HEADER_BYTES + _fixed(num_columns)
    if length < fixed:
        return GARBAGE
    room = length - fixed
    words = 8 * ((num_columns + 63) // 64)
    for column in range(num_columns):
        kind = kind_C[column]
        if kind <= FLOAT64 or not _bit(base + HEADER_BYTES, column):
            continue
        field = base + HEADER_BYTES + words + 8 * column
        start, count = np.int64(load_u32(field)), np.int64(load_u32(field + 4))
        size = count if kind == STRING else 8 * count if kind == INT64S else 4 * count
        if start + size > room:
            return GARBAGE
        if kind > INT64S:
            at = base + fixed + start
            for element in range(count):
                size += np.int64(load_u32(at + 4 * element))
            if start + size > room:
                return GARBAGE
    return 0


@jit
def check_rows(kind_C, digest, address_N, length_N, bad_N):  # type: ignore[no-untyped-def]
    """What is wrong with each value, into bad_N: an index of BAD."""
    for row in range(address_N.shape[0]):
        bad = 0
        if length_N[row]:
            bad = _fits(kind_C, digest, address_N[row], length_N[row])
            if bad == 0 and load_i64(address_N[row] + CHECKSUM_AT) != _checksum(address_N[row], length_N[row]):
                bad = GARBAGE
        bad_N[row] = bad


@jit
def not_ascii(kind_C, address_N, length_N, bad_N, suspect_N):  # type: ignore[no-untyped-def]
    """Values with a byte above 127 in their variable part, into suspect_N; bad ones are left out."""
    fixed = HEADER_BYTES + _fixed(kind_C.shape[0])
    for row in range(address_N.shape[0]):
        if length_N[row] == 0 or bad_N[row]:
            continue
        high = np.uint64(0)
        for at in range(address_N[row] + fixed, address_N[row] + length_N[row]):
            high |= load_u8(at)
        suspect_N[row] = high > 127


@jit
def measure_columns(kind_C, digest, address_N, length_N, fits_N, place_CP):  # type: ignore[no-untyped-def]
    """Which values can be read, into fits_N; where each column's buffers go, into place_CP; returns the bytes of all of them.

    place_CP: places of validity, ends, inner ends and data, then bytes of data and elements of lists. Each place is a multiple of 8.
    """
    num_columns, count = kind_C.shape[0], address_N.shape[0]
    words, fixed = 8 * ((num_columns + 63) // 64), HEADER_BYTES + _fixed(num_columns)
    place_CP[:] = 0
    for row in range(count):
        base = address_N[row]
        fits_N[row] = length_N[row] > 0 and _fits(kind_C, digest, base, length_N[row]) == 0
        if not fits_N[row]:
            continue
        for column in range(num_columns):
            kind = kind_C[column]
            if kind <= FLOAT64 or not _bit(base + HEADER_BYTES, column):
                continue
            field = base + HEADER_BYTES + words + 8 * column
            start, elements = np.int64(load_u32(field)), np.int64(load_u32(field + 4))
            place_CP[column, ELEMENTS] += elements
            if kind == STRING:
                place_CP[column, DATA_BYTES] += elements
            elif kind > INT64S:
                for element in range(elements):
                    place_CP[column, DATA_BYTES] += np.int64(load_u32(base + fixed + start + 4 * element))
    at = np.int64(0)
    for column in range(num_columns):
        kind, elements = kind_C[column], place_CP[column, ELEMENTS]
        if kind <= FLOAT64:
            place_CP[column, DATA_BYTES] = 8 * count
        elif kind == INT64S:
            place_CP[column, DATA_BYTES] = 8 * elements
        place_CP[column, VALID_PLACE] = at
        at += (((count + 7) // 8) + 7) & ~7
        place_CP[column, ENDS_PLACE] = at
        at += (4 * (count + 1) + 7) & ~7 if kind > FLOAT64 else 0
        place_CP[column, INNER_PLACE] = at
        at += (4 * (elements + 1) + 7) & ~7 if kind > INT64S else 0
        place_CP[column, DATA_PLACE] = at
        at += (place_CP[column, DATA_BYTES] + 7) & ~7
    return at


@jit
def read_columns(kind_C, address_N, fits_N, target, place_CP, missing_C):  # type: ignore[no-untyped-def]
    """Arrow buffers of all columns into memory at `target`, as `measure_columns` laid them out; missing values a column, into missing_C."""
    num_columns, count = kind_C.shape[0], address_N.shape[0]
    words, fixed = 8 * ((num_columns + 63) // 64), HEADER_BYTES + _fixed(num_columns)
    for column in range(num_columns):
        kind = kind_C[column]
        valid, ends = target + place_CP[column, VALID_PLACE], target + place_CP[column, ENDS_PLACE]
        inner, data = target + place_CP[column, INNER_PLACE], target + place_CP[column, DATA_PLACE]
        used, elements, missing, bits = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        if kind > FLOAT64:
            store_u32(ends, used)
        if kind > INT64S:
            store_u32(inner, used)
        for row in range(count):
            base = address_N[row]
            is_valid = fits_N[row] and _bit(base + HEADER_BYTES, column) != 0
            if is_valid:
                bits |= 1 << (row & 7)
            else:
                missing += 1
            if row & 7 == 7 or row == count - 1:
                store_u8(valid + (row >> 3), bits)
                bits = np.int64(0)
            if kind <= FLOAT64:
                value = np.int64(0)
                if is_valid:
                    value = load_i64(base + HEADER_BYTES + words + 8 * column)
                store_i64(data + 8 * row, value)
                continue
            if is_valid:
                field = base + HEADER_BYTES + words + 8 * column
                at = base + fixed + np.int64(load_u32(field))
                size = np.int64(load_u32(field + 4))
                if kind == STRING:
                    copy(data + used, at, size)
                elif kind == INT64S:
                    copy(data + 8 * used, at, 8 * size)
                else:
                    text = at + 4 * size
                    for element in range(size):
                        one = np.int64(load_u32(at + 4 * element))
                        copy(data + elements, text, one)
                        text += one
                        elements += one
                        store_u32(inner + 4 * (used + element + 1), elements)
                used += size
            store_u32(ends + 4 * (row + 1), used)
        missing_C[column] = missing
