"""What really happened: labels, weights and groups of log rows, as the metrics take them.

Shape legend: B rows of a record batch, T tasks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import DataError
from ninerank.features.columns import column_of, conform
from ninerank.features.hashing import hash_strings
from ninerank.features.spec import FeatureSpec

__all__ = ["Answers", "numbers"]


@dataclass(frozen=True)
class Answers:
    """label_BT float64, weight_B float64 and group_B int64; the latter two None where the spec names no such column."""

    label_BT: npt.NDArray[np.float64]
    weight_B: npt.NDArray[np.float64] | None
    group_B: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, rows: pa.RecordBatch, spec: FeatureSpec) -> "Answers":
        """Read the columns that `spec` names; raises DataError for one that is missing, of a wrong type or holds nulls."""
        labels = np.stack([numbers(rows, label) for label in spec.labels], axis=1)
        weights = numbers(rows, spec.weight) if spec.weight else None
        return cls(labels, weights, _groups(rows, spec.group) if spec.group else None)


def numbers(rows: pa.RecordBatch, column: str) -> npt.NDArray[np.float64]:
    """A column of numbers without nulls; raises DataError."""
    values: npt.NDArray[np.float64] = _without_nulls(conform(column_of(rows, column), pa.float64(), column), column).to_numpy()
    return values


def _groups(rows: pa.RecordBatch, column: str) -> npt.NDArray[np.int64]:
    """Integers as they are, anything else by the hash of its text."""
    array = _without_nulls(column_of(rows, column), column)
    if pa.types.is_integer(array.type) and not pa.types.is_uint64(array.type):
        keys: npt.NDArray[np.int64] = array.cast(pa.int64()).to_numpy()
        return keys
    return hash_strings(conform(array, pa.string(), column)).view(np.int64)


def _without_nulls(array: pa.Array, column: str) -> pa.Array:
    if array.null_count:
        row = int(np.argmin(array.is_valid().to_numpy(zero_copy_only=False)))
        raise DataError(f"column {column!r}, row {row}: null is refused; every row needs a value")
    return array
