"""Arrow columns brought to the types that a spec asks for, and the errors of those that cannot be.

One id is one id however it was stored: an int64 feature takes any integer type, integral floats and decimal strings;
a string feature takes strings and integers (as decimal strings). Null and the empty string mean missing.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ninerank.errors import DataError, nearest
from ninerank.features.spec import FeatureSpec, IdFeature, NumericFeature, SequenceFeature, Side

__all__ = ["Allowed", "arrow_schema", "arrow_type", "column_of", "conform", "is_label", "is_weight", "show"]

EXACT_INTEGER = float(1 << 53)
FLOAT32_MAX = float(np.finfo(np.float32).max)

Allowed = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.bool_]]


def is_label(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which values are 0 or 1."""
    return np.asarray((values == 0) | (values == 1), np.bool_)


def is_weight(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which values are finite in float32 and not negative."""
    return np.asarray((values >= 0) & (values <= FLOAT32_MAX), np.bool_)


def arrow_type(spec: FeatureSpec, feature: IdFeature | NumericFeature | SequenceFeature) -> pa.DataType:
    """Type that `feature`'s column has on the fast path: string, int64 or float64, or a list of ids."""
    if isinstance(feature, NumericFeature):
        return pa.float64()
    source = spec.source_of(feature) if isinstance(feature, SequenceFeature) else feature
    value = pa.string() if source.dtype == "string" else pa.int64()
    many = isinstance(feature, SequenceFeature) or feature.multi
    return pa.list_(value) if many else value


def arrow_schema(spec: FeatureSpec, side: Side | None = None, *, labels: bool = False) -> pa.Schema:
    """Columns that the features (of one side) read, with `labels` also labels, weight and group (its type is the data's: null here).

    Raises DataError where two features want one column as different types.
    """
    types: dict[str, pa.DataType] = {}
    if labels:
        types.update({label: pa.float64() for label in spec.labels})
        types.update({spec.weight: pa.float64()} if spec.weight else {})
    for feature in spec.features:
        if side is None or feature.side == side:
            wanted = arrow_type(spec, feature)
            if types.setdefault(feature.column, wanted) != wanted:
                raise DataError(f"column {feature.column!r} is read both as {types[feature.column]} and as {wanted} ({feature.name!r})")
    if labels and spec.group:
        types.setdefault(spec.group, pa.null())
    return pa.schema(list(types.items()))


def column_of(batch: pa.RecordBatch, column: str) -> pa.Array:
    """Column by name; raises DataError that names the nearest."""
    index = batch.schema.get_field_index(column)
    if index < 0:
        count = batch.schema.names.count(column)
        said = f"is there {count} times" if count else f"is missing; {nearest(column, batch.schema.names)}"
        raise DataError(f"column {column!r} {said}")
    return batch.column(index)


def conform(array: pa.Array, wanted: pa.DataType, column: str, rows: pa.Array | None = None, first_row: int = 0) -> pa.Array:
    """`array` as type `wanted`; raises DataError that names the column, the row (from 0), the value and what is allowed.

    rows: the row that each value belongs to, where values are the elements of a list column. first_row: what the file calls row 0.
    """
    held = array.type
    if held == wanted:
        return array
    if pa.types.is_null(held):
        return pa.nulls(len(array), wanted)
    if pa.types.is_dictionary(held):
        return conform(array.dictionary_decode(), wanted, column, rows, first_row)
    if pa.types.is_list(wanted):
        return _conform_list(array, wanted, column, first_row)
    if pa.types.is_string(wanted):
        if _is_text(held):
            return array.cast(wanted)
        if pa.types.is_integer(held) or pa.types.is_floating(held):
            return (_integers(array, column, rows, first_row) if pa.types.is_floating(held) else array).cast(wanted)
        raise _wrong_type(column, held, "a string id takes strings and integers")
    if pa.types.is_int64(wanted):
        return _integers(array, column, rows, first_row)
    if pa.types.is_integer(held) or pa.types.is_floating(held) or pa.types.is_boolean(held) or pa.types.is_decimal(held):
        return array.cast(pa.float64(), safe=False)
    raise _wrong_type(column, held, "a number takes integers, floats and booleans")


def _conform_list(array: pa.Array, wanted: pa.DataType, column: str, first_row: int) -> pa.Array:
    held = array.type
    if not (pa.types.is_list(held) or pa.types.is_large_list(held) or pa.types.is_fixed_size_list(held)):
        raise _wrong_type(column, held, f"a feature with many ids takes lists of {wanted.value_type}")
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    values = conform(array.flatten(), wanted.value_type, column, pc.list_parent_indices(array), first_row)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, type=wanted, mask=array.is_null() if array.null_count else None)


def _integers(array: pa.Array, column: str, rows: pa.Array | None, first_row: int) -> pa.Array:
    held = array.type
    if pa.types.is_boolean(held):
        return array.cast(pa.int64())
    if pa.types.is_integer(held):
        if pa.types.is_uint64(held):
            _refuse(column, array, rows, first_row, pc.greater(array, pa.scalar((1 << 63) - 1, pa.uint64())), "an int64 id is below 2^63")
        return array.cast(pa.int64())
    if pa.types.is_floating(held):
        wide = array.cast(pa.float64())
        integral = pc.and_(pc.equal(pc.floor(wide), wide), pc.less_equal(pc.abs(wide), EXACT_INTEGER))
        _refuse(column, array, rows, first_row, pc.invert(integral), "an id stored as a float must be a whole number of magnitude <= 2^53")
        return wide.cast(pa.int64())
    if _is_text(held):
        text = array.cast(pa.string())
        text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        decimal = pc.match_substring_regex(text, r"^-?[0-9]+$")
        _refuse(column, array, rows, first_row, pc.invert(decimal), "an int64 id is written in decimal digits")
        try:
            return text.cast(pa.int64())
        except pa.ArrowInvalid:
            fits = pa.array([value is None or -(1 << 63) <= int(value) < 1 << 63 for value in text.to_pylist()])
            _refuse(column, array, rows, first_row, pc.invert(fits), "an int64 id lies in -2^63 .. 2^63 - 1")
            raise
    raise _wrong_type(column, held, "an int64 id takes integers, integral floats and decimal strings")


def _is_text(held: pa.DataType) -> bool:
    return bool(pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held))


def _refuse(column: str, array: pa.Array, rows: pa.Array | None, first_row: int, bad: pa.Array, allowed: str) -> None:
    index = pc.index(bad, True).as_py()
    if index >= 0:
        row = first_row + (index if rows is None else rows[index].as_py())
        raise DataError(f"column {column!r}, row {row}: {show(array[index])} cannot be an id; {allowed}")


def _wrong_type(column: str, held: pa.DataType, allowed: str) -> DataError:
    return DataError(f"column {column!r} is of type {held}; {allowed}")


def show(value: pa.Scalar) -> str:
    """The value as an error message quotes it, cut at 80 characters."""
    text = repr(value.as_py())
    return text if len(text) <= 80 else text[:77] + "..."
