"""The packed value: what goes in comes out, the bytes stay what they are, and damaged bytes are told and never read past."""

import hashlib
import json
import struct

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.features.hashing import hash_bytes
from ninerank.predictor.cache.layout import BAD
from ninerank.predictor.cache.value import Packed, RowFormat

SCHEMA = pa.schema(
    {"price": pa.float64(), "stock": pa.int64(), "city": pa.string(), "tags": pa.list_(pa.string()), "past": pa.list_(pa.int64())}
)
TYPES = (pa.int64(), pa.float64(), pa.string(), pa.list_(pa.int64()), pa.list_(pa.string()))
INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)
GOLDEN = (
    "3952560168000000e4c54d80e1efb2bf00401e18240a0600976a45c71a83bbfe"  # header
    "0f00000000000000000000000000f83ffeffffffffffffff00000000050000000500000003000000"  # fixed part
    "0000000000000000c5bb6f727901000000000000000200000061626300000000"  # variable part
)
VALUES = {
    pa.int64(): INTEGERS,
    pa.float64(): st.floats(),
    pa.string(): st.text(max_size=12),
    pa.list_(pa.int64()): st.lists(INTEGERS, max_size=4),
    pa.list_(pa.string()): st.lists(st.text(max_size=6), max_size=4),
}


def reference(schema: pa.Schema, row: dict[str, object], event_time_us: int) -> bytes:
    """The layout of `value`, written down a second time."""
    valid, fields, variable = 0, b"", b""
    for index, (name, dtype) in enumerate(zip(schema.names, schema.types, strict=True)):
        value = row[name]
        valid |= (value is not None) << index
        if value is None:
            fields += bytes(8)
        elif not pa.types.is_list(dtype) and not pa.types.is_string(dtype):
            fields += struct.pack("<q" if pa.types.is_int64(dtype) else "<d", value)
        else:
            part, count = b"", len(value)  # type: ignore[arg-type]
            if pa.types.is_string(dtype):
                part = str(value).encode()
                count = len(part)
            elif pa.types.is_int64(dtype.value_type):
                part = struct.pack(f"<{count}q", *value)  # type: ignore[misc]
            else:
                texts = [text.encode() for text in value]  # type: ignore[attr-defined]
                part = struct.pack(f"<{count}I", *map(len, texts)) + b"".join(texts)
            fields += struct.pack("<II", len(variable), count)
            variable += part
    rest = valid.to_bytes(8 * ((len(schema) + 63) // 64), "little") + fields + variable
    rest += bytes(-len(rest) % 8)
    described = json.dumps([[field.name, str(field.type)] for field in schema], ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(described.encode()).digest()[:8]
    head = b"9RV\x01" + struct.pack("<I8sq", 32 + len(rest), digest, event_time_us)
    return head + struct.pack("<Q", hash_bytes(rest, hash_bytes(head))) + rest


@st.composite
def batches(draw: st.DrawFn) -> pa.RecordBatch:
    types = draw(st.lists(st.sampled_from(TYPES), max_size=5) | st.just([pa.int64()] * 70))
    count = draw(st.integers(1, 12 if len(types) < 9 else 2))
    arrays = [pa.array(draw(st.lists(st.none() | VALUES[t], min_size=count, max_size=count)), t) for t in types]
    schema = pa.schema([(f"c{n}", t) for n, t in enumerate(types)])
    if not arrays:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * count, pa.struct([])))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(-(1 << 63), (1 << 63) - 1), st.data())
def test_rows_come_back_as_they_were(rows: pa.RecordBatch, event_time_us: int, data: st.DataObject) -> None:
    row_format = RowFormat(rows.schema)
    rows = rows.slice(data.draw(st.integers(0, rows.num_rows - 1)))
    values = row_format.encode(rows, event_time_us).to_bytes()
    assert values == [reference(rows.schema, row, event_time_us) for row in rows.to_pylist()]
    order = data.draw(st.lists(st.none() | st.integers(0, rows.num_rows - 1), max_size=10))
    packed = Packed.of([None if n is None else values[n] for n in order])
    assert not row_format.check(packed).any()
    columns = row_format.decode(packed)
    for field in rows.schema:
        column = columns[field.name]
        column.validate(full=True)
        held = rows.column(field.name)
        wanted = pa.array([None if n is None else held[n].as_py() for n in order], field.type)
        assert column.type == field.type
        # NaN is no value that equals itself; its bits must be the same.
        assert str(column) == str(wanted) if pa.types.is_float64(field.type) else column.equals(wanted)


def test_the_bytes_of_a_value_are_fixed() -> None:
    rows = pa.record_batch(
        {"price": [1.5], "stock": [-2], "city": ["Żory"], "tags": [["a", "", "bc"]], "past": pa.array([None], pa.list_(pa.int64()))},
        schema=SCHEMA,
    )
    (value,) = RowFormat(SCHEMA).encode(rows, 1_700_000_000_000_000).to_bytes()
    assert value.hex() == GOLDEN
    missing = RowFormat(SCHEMA).decode(Packed.of([bytes.fromhex(GOLDEN)]))
    assert {name: column.to_pylist()[0] for name, column in missing.items()} == rows.to_pylist()[0]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_values_are_told_and_never_crash(data: st.DataObject) -> None:
    row_format = RowFormat(SCHEMA)
    whole = reference(SCHEMA, {"price": 1.0, "stock": 2, "city": "abc", "tags": ["x", "yz"], "past": [1, 2, 3]}, 5)
    value = bytearray(whole)
    kind = data.draw(st.sampled_from(["bits", "cut", "random", "insert"]))
    if kind == "bits":
        for _ in range(data.draw(st.integers(1, 3))):
            value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        value = value[: data.draw(st.integers(1, len(value) - 1))]
    elif kind == "random":
        value = bytearray(data.draw(st.binary(min_size=1, max_size=200)))
    else:
        value[32:32] = data.draw(st.binary(min_size=1, max_size=16))
    packed = Packed.of([whole, bytes(value), None])
    bad = row_format.check(packed)
    assert bad[0] == bad[2] == 0
    if bytes(value) != whole:
        assert bad[1] > 0
    for column in row_format.decode(packed).values():
        assert len(column) == 3
        column.validate()
        assert column[0].is_valid


def resealed(value: bytes) -> bytes:
    """The value with the checksum that its bytes call for: what somebody wrote on purpose."""
    return value[:24] + struct.pack("<Q", hash_bytes(value[32:], hash_bytes(value[:24]))) + value[32:]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_values_that_lie_with_a_right_checksum_are_never_read_past(data: st.DataObject) -> None:
    row_format = RowFormat(SCHEMA)
    value = bytearray(reference(SCHEMA, {"price": 1.0, "stock": 2, "city": "abc", "tags": ["x", "yz"], "past": [1, 2, 3]}, 5))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(32, len(value) - 4))
        value[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from([0, 1, 3, 8, 1 << 16, (1 << 31) - 1, (1 << 32) - 1])))
    packed = Packed.of([resealed(bytes(value))])
    bad = row_format.check(packed)
    for column in row_format.decode(packed).values():
        column.validate()
        if not bad[0]:
            column.validate(full=True)


def test_what_is_wrong_is_told_apart() -> None:
    row_format = RowFormat(SCHEMA)
    whole = reference(SCHEMA, {"price": 1.0, "stock": 2, "city": "é", "tags": ["x"], "past": None}, 5)
    other = reference(SCHEMA.remove(0), {"stock": 2, "city": "x", "tags": None, "past": None}, 5)
    latin = resealed(whole.replace("é".encode(), b"\xe9x"))
    values = [whole, b"GIF89a", whole[:-8], whole[:9], b"9RV\x07" + whole[4:], other, latin, whole + bytes(8)]
    kinds = [BAD[code] for code in RowFormat(SCHEMA).check(Packed.of(values))]
    assert kinds == ["", "garbage", "truncated", "truncated", "version", "schema", "garbage", "garbage"]
    assert row_format.digest != RowFormat(SCHEMA.remove(0)).digest


def test_rows_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(DataError, match="column 'when' is of type date32"):
        RowFormat(pa.schema({"when": pa.date32()}))
    with pytest.raises(DataError, match="column 'past': lists of integers must not hold missing values"):
        RowFormat(pa.schema({"past": pa.list_(pa.int64())})).encode(pa.record_batch({"past": [[1, None]]}), 0)
    with pytest.raises(DataError, match="row 1: 1,048,624 bytes of features; at most 1,048,576"):
        RowFormat(pa.schema({"city": pa.string()})).encode(pa.record_batch({"city": ["x", "y" * (1 << 20)]}), 0)
