"""Features of users or items as they were at a time: what a request should have seen, from a table that keeps every version of a row.

A snapshot is a Parquet file with a key column, feature columns, and, where rows change, a column that says from when each version is
valid. As of time t an entity is its last version whose time is <= t; a version that came later is the future to a request.

Shape legend: R versions, N asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ninerank.errors import DataError, nearest
from ninerank.features.columns import conform
from ninerank.features.files import reading

__all__ = ["AsOf", "Snapshot", "microseconds"]

Rows = npt.NDArray[np.int64]
BEFORE_ALL = -1


@dataclass(frozen=True)
class AsOf:
    """row_N: version that each of N entities had, -1 for those that were unknown then. next_N, end_N: its later versions lie in
    next_N <= row < end_N.
    """

    row_N: Rows
    next_N: Rows
    end_N: Rows


class Snapshot:
    """Versions of entities. schema: the feature columns wanted of one side; those that the file lacks are left out.

    key: the column of ids. time: the column that says from when a version is valid: integers are microseconds since 1970, as in the
    request log; None: one version each, valid at all times. Raises DataError for a file that cannot be read, a missing column, a null
    key or time, and two versions of one entity at one time.
    """

    def __init__(self, path: str | Path, schema: pa.Schema, *, key: str, time: str | None = None) -> None:
        self.path, self.key, self.time = Path(path), key, time
        with reading(self.path, "a snapshot"):
            names = pq.read_schema(path).names
            for name in filter(None, (key, time)):
                if name not in names:
                    raise DataError(f"{path}: column {name!r} is missing; {nearest(name, names)}")
            self.columns = tuple(name for name in schema.names if name in names)
            if not self.columns:
                raise DataError(f"{path}: holds none of the features {', '.join(schema.names)}")
            table = pq.read_table(path, columns=list(dict.fromkeys((key, *self.columns, *filter(None, (time,))))))
        keys = conform(_whole(table, key), pa.string(), key)
        times = microseconds(_whole(table, time), time, self.path) if time else pa.array(np.full(len(keys), BEFORE_ALL), pa.int64())
        for column, array in ((key, keys), (time, times)):
            if array.null_count:
                raise DataError(f"{path}: column {column!r} holds {array.null_count} nulls; each version names its entity and time")
        encoded = keys.dictionary_encode()
        code_R, time_R = encoded.indices.to_numpy(zero_copy_only=False), times.to_numpy()
        order = np.lexsort((time_R, code_R))
        code_R, time_R = code_R[order], time_R[order]
        twice = np.flatnonzero((code_R[1:] == code_R[:-1]) & (time_R[1:] == time_R[:-1]))
        if len(twice):
            when = f" at {time} {time_R[twice[0]]}" if time else "; name the column that tells versions apart"
            raise DataError(f"{path}: {key} {encoded.dictionary[int(code_R[twice[0]])].as_py()!r} is there twice{when}")
        self.time_R: Rows = time_R.astype(np.int64)
        # Entity and time as one number that rises with the rows, so that versions as of a time are found at once for all entities.
        self._times, rank_R = np.unique(self.time_R, return_inverse=True)
        self._place_R = code_R.astype(np.int64) * (len(self._times) + 1) + rank_R + 1
        self._dictionary = encoded.dictionary
        num_keys = len(encoded.dictionary)
        self._first = np.searchsorted(code_R, np.arange(num_keys))
        self._end = np.searchsorted(code_R, np.arange(num_keys), side="right")
        rows = pa.array(order)
        self._values = {name: conform(_whole(table, name), schema.field(name).type, name).take(rows) for name in self.columns}

    def as_of(self, ids: pa.Array, time_us: int) -> AsOf:
        """The versions that the entities `ids` (any type of id) had at `time_us`."""
        code_N = pc.index_in(ids if pa.types.is_string(ids.type) else ids.cast(pa.string()), self._dictionary)
        known_N = code_N.is_valid().to_numpy(zero_copy_only=False)
        code = code_N.fill_null(0).to_numpy(zero_copy_only=False)
        if not len(self._first):
            none = np.full(len(code), -1, np.int64)
            return AsOf(none, none, none)
        first_N, end_N = self._first[code], self._end[code]
        num_earlier = np.searchsorted(self._times, time_us, side="right")
        next_N = np.searchsorted(self._place_R, code * (len(self._times) + 1) + num_earlier, side="right")
        row_N = np.where(known_N & (next_N > first_N), next_N - 1, -1)
        return AsOf(row_N, np.where(known_N, next_N, 0), np.where(known_N, end_N, 0))

    def take(self, column: str, row_N: Rows) -> pa.Array:
        """Values of a column by version; null for row -1."""
        return self._values[column].take(pa.array(row_N, mask=row_N < 0))

    def features(self, found: AsOf) -> Mapping[str, pa.Array]:
        """Every column of the versions found."""
        return {name: self.take(name, found.row_N) for name in self.columns}


def _whole(table: pa.Table, name: str) -> pa.Array:
    combined = table.column(name).combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def microseconds(array: pa.Array, name: str, path: Path) -> pa.Array:
    """A column of times as int64 microseconds since 1970; raises DataError for a type that is no time."""
    if pa.types.is_timestamp(array.type):
        return array.cast(pa.timestamp("us", array.type.tz), safe=False).cast(pa.int64())
    if pa.types.is_integer(array.type):
        return array.cast(pa.int64())
    raise DataError(f"{path}: column {name!r} is of type {array.type}; a time is a timestamp, or microseconds since 1970 as an integer")
