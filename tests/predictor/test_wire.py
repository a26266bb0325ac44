"""Packed columns: what goes in comes out, and no bytes of a peer get past the checks."""

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.errors import RequestError
from ninerank.predictor.wire import decode_column, encode_column
from ninerank.proto.v1 import predictor_pb2 as pb

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
COLUMNS = st.one_of(
    *(
        st.lists(st.none() | value, max_size=20).map(lambda values, dtype=dtype: pa.array(values, dtype))
        for value, dtype in (
            (INT64, pa.int64()),
            (st.floats(allow_nan=False), pa.float64()),
            (st.floats(allow_nan=False, width=32), pa.float32()),
            (TEXT, pa.string()),
            (st.lists(INT64, max_size=5), pa.list_(pa.int64())),
            (st.lists(TEXT, max_size=5), pa.list_(pa.string())),
        )
    )
)


@settings(max_examples=300, deadline=None)
@given(COLUMNS, st.integers(0, 5))
def test_what_goes_in_comes_out(array: pa.Array, skip: int) -> None:
    sliced = array.slice(min(skip, len(array)))
    message = pb.Column.FromString(encode_column("c", sliced).SerializeToString())
    decoded = decode_column(message, len(sliced))
    decoded.validate(full=True)
    assert decoded.type == array.type
    assert decoded.to_pylist() == sliced.to_pylist()


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (pa.array([1, None], pa.int8()), pa.int64()),
        (pa.array([2**40], pa.uint64()), pa.int64()),
        (pa.array([True, None]), pa.int64()),
        (pa.array([1.5], pa.float16()), pa.float32()),
        (pa.array(["a", None]).dictionary_encode(), pa.string()),
        (pa.array(["a"], pa.large_string()), pa.string()),
        (pa.array([[1], None], pa.large_list(pa.int32())), pa.list_(pa.int64())),
        (pa.nulls(3), pa.string()),
    ],
)
def test_other_types_become_the_nearest(array: pa.Array, dtype: pa.DataType) -> None:
    decoded = decode_column(encode_column("c", array), len(array))
    assert decoded.type == dtype
    assert [value if value is not True else 1 for value in array.to_pylist()] == decoded.to_pylist()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([2**63], pa.uint64()), "'c'"),
        (pa.array([[1, None]]), "must not hold missing values"),
        (pa.array([{"a": 1}]), "cannot send struct"),
        (pa.array([b"x"]), "cannot send binary"),
        (pa.array([[[1]]]), "cannot send list"),
    ],
)
def test_what_cannot_be_sent_is_refused(array: pa.Array, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode_column("c", array)


def u32(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


STRINGS = pb.Strings(data=b"abc", offsets=u32(0, 1, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "holds no values"),
        ({"int64_values": b"x" * 17}, "int64_values has 17 bytes, 2 values of 8 bytes"),
        ({"float32_values": b"x" * 4}, "float32_values has 4 bytes"),
        ({"float64_values": b""}, "float64_values has 0 bytes"),
        ({"int64_values": b"x" * 16, "validity": b"xx"}, "validity has 2 bytes, 2 rows need 1"),
        ({"string_values": pb.Strings()}, "offsets has 0 bytes"),
        ({"string_values": pb.Strings(data=b"abc", offsets=u32(0, 2, 2))}, "end at 2, the data has 3"),
        ({"string_values": pb.Strings(data=b"abc", offsets=u32(0, 4, 3))}, "never fall"),
        ({"string_values": pb.Strings(data=b"abc", offsets=u32(1, 2, 3))}, "start at 0"),
        ({"string_values": pb.Strings(data=b"abc", offsets=u32(0, 2, 2**32 - 1))}, "below 2"),
        ({"string_values": pb.Strings(data=b"\xff\xff", offsets=u32(0, 1, 2))}, "not UTF-8"),
        ({"string_values": pb.Strings(data="é".encode(), offsets=u32(0, 1, 2))}, "not UTF-8 within its offsets"),
        ({"int64_values": b"x" * 16, "list_offsets": u32(0, 1)}, "list_offsets has 8 bytes, 2 rows need 12"),
        ({"int64_values": b"x" * 16, "list_offsets": u32(0, 5, 4)}, "never fall"),
        ({"int64_values": b"x" * 16, "list_offsets": u32(0, 1, 3)}, "int64_values has 16 bytes, 3 values"),
        ({"string_values": STRINGS, "list_offsets": u32(0, 1, 1)}, "offsets has 12 bytes, 1 rows need 8"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_column(pb.Column(name="c", **fields), 2)


def test_changed_messages_are_refused_or_read_within_their_bytes() -> None:
    """Whatever passes must survive Arrow's own full validation, which reads every offset."""
    rng = random.Random(0)
    sources = [
        encode_column("c", pa.array(values))
        for values in ([1, 2, None], [1.5, 2.5, 3.5], ["é", "", "abc"], [[1, 2], [], None], [["a", "bc"], ["d"], []])
    ]
    passed = 0
    for _ in range(5_000):
        data = bytearray(rng.choice(sources).SerializeToString())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            array = decode_column(pb.Column.FromString(bytes(data)), rng.choice([0, 1, 2, 3, 3, 3, 4]))
        except (RequestError, DecodeError):
            continue
        array.validate(full=True)
        array.to_pylist()
        passed += 1
    assert passed > 100
