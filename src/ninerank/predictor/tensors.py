"""Tensors of the Open Inference Protocol as Arrow columns.

    a column with one value a row     [R] or [R, 1]
    a column of lists                 [R, L]; with an INT64 or INT32 tensor NAME.lengths [R], of row r the first lengths[r] values count

Shape legend: R rows, L values a row.
"""

import struct
from collections.abc import Mapping
from math import prod

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import RequestError, nearest
from ninerank.proto.inference import open_inference_pb2 as oip

__all__ = ["LENGTHS", "columns_of", "datatype_of"]

LENGTHS = ".lengths"
MAX_ELEMENTS = 1 << 27
_FIXED = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("<i1", "int_contents"),
    "INT16": ("<i2", "int_contents"),
    "INT32": ("<i4", "int_contents"),
    "INT64": ("<i8", "int64_contents"),
    "UINT8": ("<u1", "uint_contents"),
    "UINT16": ("<u2", "uint_contents"),
    "UINT32": ("<u4", "uint_contents"),
    "UINT64": ("<u8", "uint64_contents"),
    "FP16": ("<f2", ""),
    "FP32": ("<f4", "fp32_contents"),
    "FP64": ("<f8", "fp64_contents"),
}


def datatype_of(dtype: pa.DataType) -> tuple[str, list[int]]:
    """Datatype and shape that a column of the spec has as a tensor.

    >>> datatype_of(pa.list_(pa.string()))
    ('BYTES', [-1, -1])
    """
    if pa.types.is_list(dtype):
        return datatype_of(dtype.value_type)[0], [-1, -1]
    name = "BYTES" if pa.types.is_string(dtype) else "INT64" if pa.types.is_int64(dtype) else "FP64"
    return name, [-1]


def columns_of(request: oip.ModelInferRequest, types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    """The request's inputs by column name; `types` are the columns that the spec reads. Raises RequestError."""
    is_raw = bool(request.raw_input_contents)
    if is_raw and len(request.raw_input_contents) != len(request.inputs):
        raise RequestError(f"{len(request.inputs)} inputs and {len(request.raw_input_contents)} raw_input_contents, as many are needed")
    flat: dict[str, tuple[oip.ModelInferRequest.InferInputTensor, pa.Array]] = {}
    for place, tensor in enumerate(request.inputs):
        if tensor.name not in types and tensor.name.removesuffix(LENGTHS) not in types:
            raise RequestError(f"unknown input {tensor.name[:100]!r}; {nearest(tensor.name[:100], types)}")
        if tensor.name in flat:
            raise RequestError(f"input {tensor.name!r} is sent twice")
        flat[tensor.name] = tensor, _values(tensor, request.raw_input_contents[place] if is_raw else None)
    return {name: _column(name, tensor, values, types[name], flat) for name, (tensor, values) in flat.items() if name in types}


def _column(
    name: str,
    tensor: oip.ModelInferRequest.InferInputTensor,
    values: pa.Array,
    dtype: pa.DataType,
    flat: Mapping[str, tuple[oip.ModelInferRequest.InferInputTensor, pa.Array]],
) -> pa.Array:
    shape = list(tensor.shape)
    if not pa.types.is_list(dtype):
        if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
            return values
        raise RequestError(f"input {name!r} has shape {shape[:8]}, [rows] is needed")
    if len(shape) != 2:
        raise RequestError(f"input {name!r} has shape {shape[:8]}, [rows, values] is needed")
    rows, width = shape
    lengths_R: npt.NDArray[np.int64] = np.full(rows, width, np.int64)
    if name + LENGTHS in flat:
        given = flat[name + LENGTHS][1]
        if len(given) != rows or not pa.types.is_integer(given.type):
            raise RequestError(f"input {name + LENGTHS!r} needs {rows} whole numbers, one a row")
        lengths_R = given.to_numpy(zero_copy_only=False).astype(np.int64)
        if rows and not (lengths_R.min() >= 0 and lengths_R.max() <= width):
            raise RequestError(f"input {name + LENGTHS!r} holds {lengths_R.min()} to {lengths_R.max()}, 0 to {width} are allowed")
        values = values.filter(pa.array((np.arange(width) < lengths_R[:, None]).reshape(-1)))
    offsets = np.concatenate([[0], np.cumsum(lengths_R)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _values(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None) -> pa.Array:
    """The tensor's elements, row by row."""
    name, shape = tensor.name, tensor.shape
    if not shape or min(shape) < 0 or (count := prod(shape)) > MAX_ELEMENTS:
        raise RequestError(f"input {name!r} has shape {list(shape)[:8]}, one or two sizes of 0 or more are needed")
    if tensor.datatype == "BYTES":
        elements = list(tensor.contents.bytes_contents) if raw is None else _elements(name, raw, count)
        _check_count(name, len(elements), count)
        try:
            return pa.array([element.decode() for element in elements], pa.string())
        except UnicodeDecodeError:
            raise RequestError(f"input {name!r} is not UTF-8") from None
    if tensor.datatype not in _FIXED:
        raise RequestError(f"input {name!r} has datatype {tensor.datatype[:20]!r}; {nearest(tensor.datatype[:20], [*_FIXED, 'BYTES'])}")
    dtype, field = _FIXED[tensor.datatype]
    if raw is not None:
        if len(raw) != count * np.dtype(dtype).itemsize:
            raise RequestError(f"input {name!r} has {len(raw)} bytes, {count} values of {tensor.datatype} are needed")
        values = np.frombuffer(raw, dtype)
    elif not field:
        raise RequestError(f"input {name!r}: {tensor.datatype} comes as raw_input_contents alone")
    else:
        values = np.array(getattr(tensor.contents, field))
        _check_count(name, len(values), count)
    return pa.array(values.astype(np.int64) if tensor.datatype == "BOOL" else values)


def _check_count(name: str, has: int, needed: int) -> None:
    if has != needed:
        raise RequestError(f"input {name!r} has {has} values, its shape needs {needed}")


def _elements(name: str, raw: bytes, count: int) -> list[bytes]:
    """Elements that each follow their length in 4 bytes."""
    elements: list[bytes] = []
    place, end = 0, len(raw)
    while place < end and len(elements) < count:
        if place + 4 > end:
            break
        (length,) = struct.unpack_from("<I", raw, place)
        elements.append(raw[place + 4 : place + 4 + length])
        place += 4 + length
    if place != end:
        raise RequestError(f"input {name!r}: its raw contents are not {count} elements that each follow their length")
    return elements
