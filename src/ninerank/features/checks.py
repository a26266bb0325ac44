"""What the reader makes of each record batch: the spec's columns, of the spec's types, with the file and row in every complaint."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ninerank.errors import DataError, nearest
from ninerank.features.columns import Allowed, arrow_schema, conform, is_label, is_weight, show
from ninerank.features.files import LogFile
from ninerank.features.spec import FeatureSpec, IdFeature, NumericFeature, SequenceFeature

__all__ = ["RowCheck"]


class RowCheck:
    """Selects, converts and checks the columns of a spec; without a spec, rows pass as they are."""

    def __init__(self, spec: FeatureSpec | None, extra: tuple[str, ...] = ()) -> None:
        self.spec, self.extra = spec, extra
        self.schema = arrow_schema(spec, labels=True) if spec else pa.schema([])
        self.labels = frozenset(spec.labels) if spec else frozenset()
        self.numbers = {f.column for f in spec.features if isinstance(f, NumericFeature)} if spec else set()
        self.separators = {f.column: f.separator for f in spec.features if _many(f)} if spec else {}  # type: ignore[union-attr]

    def text_types(self) -> dict[str, pa.DataType]:
        """Types that a text file's columns are read as: lists as one string, a group of no known type as a string."""
        as_text = {field.name: pa.types.is_list(field.type) or pa.types.is_null(field.type) for field in self.schema}
        return {field.name: pa.string() if as_text[field.name] else field.type for field in self.schema}

    def libsvm_numbers(self) -> tuple[int, ...]:
        """Indices whose values a spec reads as columns `f<index>`."""
        wanted = [*self.schema.names, *self.extra]
        return tuple(int(name[1:]) for name in wanted if name[:1] == "f" and name[1:].isdecimal())

    def columns_of(self, file: LogFile) -> list[str] | None:
        """Columns to read of `file`; raises DataError for one that is not there or there twice."""
        if self.spec is None:
            return None
        wanted = list(dict.fromkeys([*self.schema.names, *self.extra]))
        for name in wanted:
            count = list(file.names).count(name)
            if count != 1:
                said = f"is there {count} times" if count else f"is missing; {nearest(name, file.names)}"
                raise DataError(f"{file.path}: column {name!r} {said}")
        return wanted

    def __call__(self, rows: pa.RecordBatch, path: Path, first_row: int) -> pa.RecordBatch:
        if self.spec is None:
            return rows
        try:
            arrays = {field.name: self._column(rows.column(field.name), field, first_row) for field in self.schema}
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        arrays.update({name: rows.column(name) for name in self.extra if name not in arrays})
        return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))

    def _column(self, array: pa.Array, field: pa.Field, first_row: int) -> pa.Array:
        if pa.types.is_null(field.type):
            return self._group(array, field.name, first_row)
        if pa.types.is_list(field.type) and pa.types.is_string(array.type) and field.name in self.separators:
            array = pc.split_pattern(array, self.separators[field.name])
        array = conform(array, field.type, field.name, first_row=first_row)
        if field.name in self.labels:
            self._demand(array, False, is_label, field.name, first_row, "a label is 0 or 1")
        elif self.spec is not None and field.name == self.spec.weight:
            self._demand(array, False, is_weight, field.name, first_row, "a weight is finite and >= 0")
        elif field.name in self.numbers:
            self._demand(array, True, np.isfinite, field.name, first_row, "a number is finite; leave a missing one empty (null)")
        return array

    @staticmethod
    def _group(array: pa.Array, column: str, first_row: int) -> pa.Array:
        """Groups of one type in all files: int64 where they are integers, else strings."""
        if array.null_count:
            row = first_row + pc.index(array.is_null(), True).as_py()
            raise DataError(f"column {column!r}, row {row}: null cannot be a group of GAUC; give every row a group")
        whole = pa.types.is_integer(array.type) and not pa.types.is_uint64(array.type)
        return conform(array, pa.int64() if whole else pa.string(), column, first_row=first_row)

    @staticmethod
    def _demand(array: pa.Array, nullable: bool, allowed: Allowed, column: str, first_row: int, rule: str) -> None:
        if array.null_count and not nullable:
            row = pc.index(array.is_null(), True).as_py()
            raise DataError(f"column {column!r}, row {first_row + row}: null is refused; {rule}")
        good = allowed(array.fill_null(0.0).to_numpy(zero_copy_only=False))
        if not good.all():
            row = int(np.argmin(good))
            raise DataError(f"column {column!r}, row {first_row + row}: {show(array[row])} is refused; {rule}")


def _many(feature: IdFeature | NumericFeature | SequenceFeature) -> bool:
    return isinstance(feature, SequenceFeature) or (isinstance(feature, IdFeature) and feature.multi)
