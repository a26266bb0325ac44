"""Packed columns of the wire format to and from Arrow arrays, in place where the layout allows.

Whatever a peer can send is checked here before Arrow sees it: lengths, offsets, UTF-8.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import RequestError
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["decode_column", "encode_column"]

_FIXED = {
    "int64_values": (pa.int64(), 8),
    "float32_values": (pa.float32(), 4),
    "float64_values": (pa.float64(), 8),
}
_INT64 = pa.int64()


def decode_column(column: pb.Column, num_rows: int) -> pa.Array:
    """The column's `num_rows` values as an Arrow array that shares the message's memory.

    Raises RequestError for bytes that do not make that many rows, offsets that run backwards or past the end, and text
    that is not UTF-8.
    """
    data: bytes = column.int64_values
    if data and len(data) == 8 * num_rows and not column.validity and not column.list_offsets:  # most columns: nothing else to look at
        return pa.Array.from_buffers(_INT64, num_rows, [None, pa.py_buffer(data)], 0)
    kind = column.WhichOneof("values")
    if kind is None:
        raise RequestError(
            f"column {column.name!r} holds no values: set one of int64_values, float32_values, float64_values, string_values"
        )
    validity = _validity(column, num_rows)
    if not column.list_offsets:
        return _values(column, kind, num_rows, validity)
    offsets = _offsets(column.name, "list_offsets", column.list_offsets, num_rows)
    values = _values(column, kind, int(offsets[-1]), None)
    return pa.Array.from_buffers(pa.list_(values.type), num_rows, [validity, pa.py_buffer(column.list_offsets)], children=[values])


def _values(column: pb.Column, kind: str, count: int, validity: pa.Buffer | None) -> pa.Array:
    if kind in _FIXED:
        dtype, width = _FIXED[kind]
        data: bytes = getattr(column, kind)
        if len(data) != count * width:
            raise RequestError(f"column {column.name!r}: {kind} has {len(data)} bytes, {count} values of {width} bytes are needed")
        return pa.Array.from_buffers(dtype, count, [validity, pa.py_buffer(data)])
    strings = column.string_values
    offsets = _offsets(column.name, "string_values.offsets", strings.offsets, count)
    if int(offsets[-1]) != len(strings.data):
        raise RequestError(f"column {column.name!r}: string_values.offsets end at {offsets[-1]}, the data has {len(strings.data)} bytes")
    array = pa.Array.from_buffers(pa.string(), count, [validity, pa.py_buffer(strings.offsets), pa.py_buffer(strings.data)])
    if not strings.data.isascii():
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            raise RequestError(f"column {column.name!r}: string_values.data is not UTF-8 within its offsets") from None
    return array


def _offsets(name: str, what: str, data: bytes, count: int) -> npt.NDArray[np.uint32]:
    if len(data) != 4 * (count + 1):
        raise RequestError(f"column {name!r}: {what} has {len(data)} bytes, {count} rows need {4 * (count + 1)}")
    offsets = np.frombuffer(data, "<u4")
    if offsets[0] != 0 or offsets[-1] > np.iinfo(np.int32).max or (offsets[1:] < offsets[:-1]).any():
        raise RequestError(f"column {name!r}: {what} must start at 0, never fall, and stay below 2^31")
    return offsets


def _validity(column: pb.Column, num_rows: int) -> pa.Buffer | None:
    if not column.validity:
        return None
    needed = (num_rows + 7) // 8
    if len(column.validity) != needed:
        raise RequestError(f"column {column.name!r}: validity has {len(column.validity)} bytes, {num_rows} rows need {needed}")
    return pa.py_buffer(column.validity)


def encode_column(name: str, array: pa.Array) -> pb.Column:
    """Pack an Arrow array of integers, numbers, strings, or lists of them.

    Raises RequestError for any other type, for integers beyond int64, and for missing values inside lists.

    >>> column = encode_column("price", pa.array([1.5, None]))
    >>> decode_column(column, 2).to_pylist()
    [1.5, None]
    """
    column = pb.Column(name=name)
    if array.null_count:
        column.validity = np.packbits(array.is_valid().to_numpy(zero_copy_only=False), bitorder="little").tobytes()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        column.list_offsets = _pack_offsets(lengths)
        array = array.flatten()
        if array.null_count:
            raise RequestError(f"column {name!r}: lists must not hold missing values")
    _encode_values(column, array)
    return column


def _encode_values(column: pb.Column, array: pa.Array) -> None:
    dtype = array.type
    if pa.types.is_boolean(dtype) or pa.types.is_integer(dtype):
        column.int64_values = _fixed(column.name, array, pa.int64())
    elif pa.types.is_float32(dtype) or pa.types.is_float16(dtype):
        column.float32_values = _fixed(column.name, array, pa.float32())
    elif pa.types.is_float64(dtype):
        column.float64_values = _fixed(column.name, array, pa.float64())
    elif pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_null(dtype):
        text = array.cast(pa.large_string()).fill_null("")
        _, offsets, data = text.buffers()
        bounds = np.frombuffer(offsets, "<i8")[text.offset : text.offset + len(text) + 1] if len(text) else np.zeros(1, np.int64)
        column.string_values.data = b"" if data is None else data[int(bounds[0]) : int(bounds[-1])].to_pybytes()
        column.string_values.offsets = _pack_offsets(np.diff(bounds))
    else:
        raise RequestError(f"column {column.name!r}: cannot send {dtype}; integers, numbers, strings and lists of these can be sent")


def _fixed(name: str, array: pa.Array, dtype: pa.DataType) -> bytes:
    try:
        values: bytes = array.cast(dtype).fill_null(0).to_numpy(zero_copy_only=False).tobytes()
    except pa.ArrowInvalid as error:
        raise RequestError(f"column {name!r}: {error}") from None
    return values


def _pack_offsets(lengths: npt.NDArray[np.int64]) -> bytes:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise RequestError(f"{offsets[-1]} values or bytes in one column are too many; at most {np.iinfo(np.int32).max}")
    return offsets.astype("<u4").tobytes()
