"""The packed value of one entity: what Redis holds, what the shared memory holds, and how many of them become Arrow columns at once.

    0   magic "9RV", format version 1         8   schema digest, 8 bytes            24  XXH64 of the rest, keyed by bytes 0..23
    4   length of the whole value, uint32     16  event time, int64, microseconds   32  fixed part, then variable part

Little-endian throughout. The fixed part is a bit a column (set: the value is there; least significant first, whole words of 8 bytes) and
8 bytes a column: int64, float64, or for strings and lists uint32 start in the variable part and uint32 count (bytes, or elements).
A list of int64 is 8 bytes an element; a list of strings one uint32 length each, then their UTF-8 bytes. Zeros fill up to 8 bytes.

Shape legend: N values, C columns.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import DataError, RequestError
from ninerank.predictor.cache import layout
from ninerank.predictor.cache.layout import BAD, MAX_VALUE_BYTES, Kind

__all__ = ["Packed", "RowFormat"]

MAX_DECODED_BYTES = 1 << 30  # Arrow's ends are int32


@dataclass(frozen=True)
class Packed:
    """N values: where each lies and how many bytes it has, 0 for none. held: the memory, kept alive."""

    address_N: npt.NDArray[np.int64]
    length_N: npt.NDArray[np.int64]
    held: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.address_N)

    @classmethod
    def of(cls, values: Sequence[bytes | None]) -> "Packed":
        """Values as a store gives them; None: no value."""
        whole = b"".join([value for value in values if value is not None])
        length_N = np.fromiter((0 if value is None else len(value) for value in values), np.int64, len(values))
        return cls(pa.py_buffer(whole).address + np.cumsum(length_N) - length_N, length_N, (whole,))

    def to_bytes(self) -> list[bytes]:
        """Each value on its own."""
        pairs = zip(self.address_N.tolist(), self.length_N.tolist(), strict=True)
        return [pa.foreign_buffer(address, length, self).to_pybytes() if length else b"" for address, length in pairs]


class RowFormat:
    """Packs rows of one Arrow schema and unpacks them again.

    Columns are int64, float64, string, or lists of int64 or string. digest: of their names and types, on every value.

    >>> rows = pa.record_batch({"price": [1.5, None], "city": ["Rome", "Oslo"]})
    >>> values = RowFormat(rows.schema).encode(rows, event_time_us=0).to_bytes()
    >>> columns = RowFormat(rows.schema).decode(Packed.of([values[1], None, values[0]]))
    >>> columns["price"].to_pylist(), columns["city"].to_pylist()
    ([None, None, 1.5], ['Oslo', None, 'Rome'])
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.names: list[str] = list(schema.names)
        self._types: list[pa.DataType] = list(schema.types)
        self._kinds = [_kind(field) for field in schema]
        self._kind_C = np.array(self._kinds, np.int64)
        described = json.dumps([[field.name, str(field.type)] for field in schema], ensure_ascii=False, separators=(",", ":"))
        self.digest = hashlib.sha256(described.encode()).digest()[:8]
        self.digest_word = int.from_bytes(self.digest, "little", signed=True)

    @property
    def fixed_bytes(self) -> int:
        """Header and fixed part of a value."""
        return layout.HEADER_BYTES + layout.fixed_bytes(len(self._types))

    @property
    def variable_columns(self) -> int:
        """Columns with a share in the variable part."""
        return int(np.count_nonzero(self._kind_C > layout.FLOAT64))

    def encode(self, rows: pa.RecordBatch, event_time_us: int | npt.NDArray[np.int64]) -> Packed:
        """One value a row of `rows`, which has this schema's columns in any order.

        event_time_us: Unix time in microseconds at which the features held; of two values of an entity the later one counts.
        Raises DataError for a row of more than 1 MiB and for missing values in lists of integers.
        """
        arrays = [rows.column(name) for name in self.names]
        source_CK = np.array([_addresses(array, name) for name, array in zip(self.names, arrays, strict=True)], np.int64)
        source_CK = source_CK.reshape(len(arrays), layout.SOURCE_FIELDS)
        length_N = np.empty(rows.num_rows, np.int64)
        layout.measure_rows(self._kind_C, source_CK, length_N)
        if len(length_N) and int(length_N.max()) > MAX_VALUE_BYTES:
            row = int(length_N.argmax())
            raise DataError(f"row {row}: {int(length_N[row]):,} bytes of features; at most {MAX_VALUE_BYTES:,}")
        arena = np.zeros(int(length_N.sum()), np.uint8)
        address_N = arena.ctypes.data + np.cumsum(length_N) - length_N
        event_N = np.ascontiguousarray(np.broadcast_to(np.asarray(event_time_us, np.int64), rows.num_rows))
        layout.write_rows(self._kind_C, source_CK, self.digest_word, event_N, address_N, length_N)
        return Packed(address_N, length_N, (arena,))

    def check(self, values: Packed) -> npt.NDArray[np.uint8]:
        """What is wrong with each value: an index of `layout.BAD`, 0 for nothing; a value of no bytes has nothing wrong."""
        bad_N = np.empty(len(values), np.uint8)
        layout.check_rows(self._kind_C, self.digest_word, values.address_N, values.length_N, bad_N)
        if self.variable_columns:
            self._check_text(values, bad_N)
        return bad_N

    def read(self, value: bytes, what: str) -> dict[str, Any]:
        """One value as plain Python, with its event time as `event_time_us`; raises DataError that names `what` for one that is none."""
        packed = Packed.of([value])
        bad = BAD[int(self.check(packed)[0])]
        if bad or not value:
            own = self.digest.hex()
            said = {"schema": f"of schema {value[8:16].hex()}, servers of this spec read {own}"}.get(bad, bad or "empty")
            raise DataError(f"{what} is {said}; `ninerank cache load` writes it anew")
        row: dict[str, Any] = {name: column[0].as_py() for name, column in self.decode(packed).items()}
        return {**row, "event_time_us": int.from_bytes(value[layout.EVENT_AT : layout.EVENT_AT + 8], "little", signed=True)}

    def decode(self, values: Packed) -> dict[str, pa.Array]:
        """Columns of values that `check` found nothing wrong with; a value of no bytes has no features.

        Whatever the bytes are, nothing outside of them is read: a value that is none has no features either.
        """
        count, num_columns = len(values), len(self._types)
        fits_N, missing_C = np.empty(count, np.bool_), np.empty(num_columns, np.int64)
        place_CP = np.empty((num_columns, layout.PLACE_FIELDS), np.int64)
        total = layout.measure_columns(self._kind_C, self.digest_word, values.address_N, values.length_N, fits_N, place_CP)
        if total > MAX_DECODED_BYTES:
            raise RequestError(f"the features of these {count} ids take {total:,} bytes; at most {MAX_DECODED_BYTES:,} in one request")
        arena = np.empty(total, np.uint8)
        layout.read_columns(self._kind_C, values.address_N, fits_N, arena.ctypes.data, place_CP, missing_C)
        whole, columns = pa.py_buffer(arena), {}
        for name, dtype, kind, place, missing in zip(
            self.names, self._types, self._kinds, place_CP.tolist(), missing_C.tolist(), strict=True
        ):
            columns[name] = _array(dtype, kind, count, whole, place, missing)
        return columns

    def _check_text(self, values: Packed, bad_N: npt.NDArray[np.uint8]) -> None:
        """Mark values whose strings are not UTF-8: their checksum holds, so somebody wrote them like that."""
        text = [column for column, kind in enumerate(self._kinds) if kind in (Kind.STRING, Kind.STRINGS)]
        suspect_N = np.zeros(len(values), np.bool_)
        layout.not_ascii(self._kind_C, values.address_N, values.length_N, bad_N, suspect_N)
        for row in suspect_N.nonzero()[0].tolist():
            columns = self.decode(Packed(values.address_N[row : row + 1], values.length_N[row : row + 1], values.held))
            try:
                for column in text:
                    columns[self.names[column]].validate(full=True)
            except pa.ArrowInvalid:
                bad_N[row] = BAD.index("garbage")


def _array(dtype: pa.DataType, kind: int, count: int, whole: pa.Buffer, place: list[int], missing: int) -> pa.Array:
    valid_at, ends_at, inner_at, data_at, data_bytes, elements = place
    valid = whole.slice(valid_at, (count + 7) // 8) if missing else None
    data = whole.slice(data_at, data_bytes)
    if kind <= layout.FLOAT64:
        return pa.Array.from_buffers(dtype, count, [valid, data], missing)
    ends = whole.slice(ends_at, 4 * (count + 1))
    if kind == layout.STRING:
        return pa.Array.from_buffers(dtype, count, [valid, ends, data], missing)
    inner = [None, data] if kind == layout.INT64S else [None, whole.slice(inner_at, 4 * (elements + 1)), data]
    child = pa.Array.from_buffers(dtype.value_type, elements, inner, 0)
    return pa.Array.from_buffers(dtype, count, [valid, ends], missing, children=[child])


def _kind(field: pa.Field) -> int:
    dtype = field.type
    kinds = {
        pa.int64(): Kind.INT64,
        pa.float64(): Kind.FLOAT64,
        pa.string(): Kind.STRING,
        pa.list_(pa.int64()): Kind.INT64S,
        pa.list_(pa.string()): Kind.STRINGS,
    }
    for known, kind in kinds.items():
        if dtype == known:
            return kind
    raise DataError(f"column {field.name!r} is of type {dtype}; cached are int64, float64, string, and lists of int64 and string")


def _addresses(array: pa.Array, name: str) -> tuple[int, ...]:
    """validity, offset, data, ends, inner ends, offset of inner values: addresses and element counts, 0 where there is none."""
    buffers = array.buffers()
    valid = buffers[0].address if buffers[0] is not None and array.null_count else 0
    if not pa.types.is_list(array.type):
        data = buffers[-1]
        ends = buffers[1].address if pa.types.is_string(array.type) and buffers[1] is not None else 0
        return valid, array.offset, data.address if data is not None else 0, ends, 0, 0
    inner = array.values
    if inner.null_count and pa.types.is_int64(inner.type) and array.flatten().null_count:
        raise DataError(f"column {name!r}: lists of integers must not hold missing values")
    held = inner.buffers()
    data, ends = held[-1], buffers[1]
    inner_ends = held[1].address if pa.types.is_string(inner.type) and held[1] is not None else 0
    return valid, array.offset, data.address if data is not None else 0, ends.address if ends is not None else 0, inner_ends, inner.offset
