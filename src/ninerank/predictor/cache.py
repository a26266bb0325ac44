"""Item features by id: what the server looks up so that requests need to send ids alone.

A `FeatureSource` answers a whole request's ids at once. `FeatureCache` is the one in process; a source over the network
answers the same call, and one cache in front of another is a source again.

Shape legend: N ids of a request, S slots.
"""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ninerank.errors import DataError, RequestError, nearest
from ninerank.features.columns import conform

__all__ = ["CacheStats", "EntityRows", "FeatureCache", "FeatureSource", "load_items"]

log = logging.getLogger(__name__)

# What a row costs beside its values: key object, entry of the map, reference bit.
ROW_OVERHEAD_BYTES = 200
OBJECT_BYTES = 56
LOAD_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class EntityRows:
    """Raw features of N entities: one array a column, missing where an entity is unknown. known_N: which ones are known."""

    columns: dict[str, pa.Array]
    known_N: npt.NDArray[np.bool_]


class FeatureSource(Protocol):
    """Raw feature rows by entity id; called by any number of threads at once."""

    key: str
    """Column that holds the ids."""

    def fetch(self, ids: pa.Array) -> EntityRows:
        """Rows of `ids`, in their order. Raises RequestError for ids of the wrong type, never for ids that are unknown."""


@dataclass(frozen=True)
class CacheStats:
    """Counters since the start, and what is held now."""

    entities: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int


class FeatureCache:
    """Rows of entities in memory, at most `capacity_bytes` of them; the CLOCK algorithm evicts what was not asked for lately.

    schema: the columns kept, `key` among them. Bytes are estimated per row from its values.

    >>> cache = FeatureCache(pa.schema({"id": pa.string(), "price": pa.float64()}), key="id", capacity_bytes=1 << 20)
    >>> cache.put(pa.record_batch({"id": ["a", "b"], "price": [1.0, 2.0]}))
    0
    >>> rows = cache.fetch(pa.array(["b", "x"]))
    >>> rows.columns["price"].to_pylist(), rows.known_N.tolist()
    ([2.0, None], [True, False])
    """

    def __init__(self, schema: pa.Schema, *, key: str, capacity_bytes: int) -> None:
        if key not in schema.names:
            raise DataError(f"key column {key!r} is missing; {nearest(key, schema.names)}")
        self.schema = schema
        self.key = key
        self.capacity_bytes = capacity_bytes
        self._key_type = schema.field(key).type
        self._columns = {field.name: _column(field.type) for field in schema}
        self._slot_of: dict[Any, int] = {}
        self._key_S: list[Any] = []
        self._row_bytes_S: list[int] = []
        self._referenced_S = np.zeros(0, np.uint8)
        self._free: list[int] = []
        self._hand = 0
        self._used_bytes = self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def put(self, rows: pa.RecordBatch) -> int:
        """Insert or replace rows, which have the cache's columns; of an id that comes twice the last row counts.

        Returns how many other rows had to go. Raises DataError for a missing id and for a row larger than the cache.
        """
        keys = rows.column(self.key).to_pylist()
        if None in keys:
            raise DataError(f"column {self.key!r}, row {keys.index(None)}: an entity without id")
        row_bytes = _row_bytes(rows)
        if len(keys) and row_bytes.max() > self.capacity_bytes:
            raise DataError(
                f"id {keys[int(row_bytes.argmax())]!r}: a row of {row_bytes.max()} bytes, the cache holds {self.capacity_bytes}"
            )
        last = {key: row for row, key in enumerate(keys)}
        with self._lock:
            before = self._evictions
            slots = [self._claim(key, int(row_bytes[row])) for key, row in last.items()]
            # A row put early in a batch larger than the cache may have been evicted by a later one of the same batch.
            kept = [(slot, row) for slot, (key, row) in zip(slots, last.items(), strict=True) if self._slot_of.get(key) == slot]
            slot_K, row_K = (np.array(part, np.int64) for part in zip(*kept, strict=True)) if kept else (np.zeros(0, np.int64),) * 2
            for name, column in self._columns.items():
                column.write(slot_K, rows.column(name).take(pa.array(row_K)), len(self._key_S))
            return self._evictions - before

    def fetch(self, ids: pa.Array) -> EntityRows:
        """Rows of `ids`; the key column holds the ids themselves, known or not."""
        try:
            ids = conform(ids, self._key_type, self.key)
        except (DataError, pa.ArrowInvalid) as error:
            raise RequestError(f"candidate ids: {error}") from None
        with self._lock:
            find = self._slot_of.get
            slot_N = np.array([find(key, -1) for key in ids.to_pylist()], np.int64)
            known_N = slot_N >= 0
            found = int(np.count_nonzero(known_N))
            self._hits += found
            self._misses += len(slot_N) - found
            self._referenced_S[slot_N[known_N]] = 1
            columns = {name: column.read(slot_N, known_N) for name, column in self._columns.items() if name != self.key}
        return EntityRows({self.key: ids, **columns}, known_N)

    def stats(self) -> CacheStats:
        """Counters and sizes at this moment."""
        with self._lock:
            return CacheStats(len(self._slot_of), self._used_bytes, self.capacity_bytes, self._hits, self._misses, self._evictions)

    def _claim(self, key: Any, row_bytes: int) -> int:
        slot = self._slot_of.get(key)
        if slot is not None:
            self._used_bytes -= self._row_bytes_S[slot]
            self._row_bytes_S[slot] = 0
        while self._used_bytes + row_bytes > self.capacity_bytes:
            self._evict(keep=slot)
        if slot is None:
            slot = self._free.pop() if self._free else self._grow()
            self._slot_of[key] = slot
            self._key_S[slot] = key
        self._row_bytes_S[slot] = row_bytes
        self._used_bytes += row_bytes
        # Not referenced yet: rows that come and are never asked for must not push out those that are.
        self._referenced_S[slot] = 0
        return slot

    def _grow(self) -> int:
        slot = len(self._key_S)
        self._key_S.append(None)
        self._row_bytes_S.append(0)
        if slot >= len(self._referenced_S):
            self._referenced_S = np.concatenate([self._referenced_S, np.zeros(max(1024, slot), np.uint8)])
        return slot

    def _evict(self, keep: int | None) -> None:
        """Turn the hand past rows asked for since it last came by, and free the first that was not."""
        while True:
            slot = self._hand
            self._hand = (slot + 1) % len(self._key_S)
            if self._key_S[slot] is None or slot == keep:
                continue
            if self._referenced_S[slot]:
                self._referenced_S[slot] = 0
                continue
            del self._slot_of[self._key_S[slot]]
            self._used_bytes -= self._row_bytes_S[slot]
            self._key_S[slot] = None
            self._free.append(slot)
            self._evictions += 1
            return


class _FixedColumn:
    """Integers or numbers by slot."""

    def __init__(self, dtype: pa.DataType) -> None:
        self.dtype = dtype
        self.value_S = np.zeros(0, np.int64 if pa.types.is_int64(dtype) else np.float64)
        self.valid_S = np.zeros(0, np.bool_)

    def write(self, slot_K: npt.NDArray[np.int64], values: pa.Array, num_slots: int) -> None:
        self.value_S, self.valid_S = _sized(self.value_S, num_slots), _sized(self.valid_S, num_slots)
        self.value_S[slot_K] = values.fill_null(0).to_numpy(zero_copy_only=False)
        self.valid_S[slot_K] = values.is_valid().to_numpy(zero_copy_only=False)

    def read(self, slot_N: npt.NDArray[np.int64], known_N: npt.NDArray[np.bool_]) -> pa.Array:
        if not len(self.value_S):
            return pa.nulls(len(slot_N), self.dtype)
        missing_N = ~(known_N & self.valid_S[slot_N])
        return pa.array(self.value_S[slot_N], self.dtype, mask=missing_N if missing_N.any() else None)


class _ObjectColumn:
    """Strings, or lists, by slot; equal strings of one `put` are one object."""

    def __init__(self, dtype: pa.DataType) -> None:
        self.dtype = dtype
        self.value_S = np.zeros(0, object)

    def write(self, slot_K: npt.NDArray[np.int64], values: pa.Array, num_slots: int) -> None:
        self.value_S = _sized(self.value_S, num_slots)
        if pa.types.is_string(self.dtype):
            encoded = values.dictionary_encode()
            objects = np.array([*encoded.dictionary.to_pylist(), None], object)
            self.value_S[slot_K] = objects[encoded.indices.fill_null(len(objects) - 1).to_numpy(zero_copy_only=False)]
        else:
            for slot, value in zip(slot_K.tolist(), values.to_pylist(), strict=True):
                self.value_S[slot] = value

    def read(self, slot_N: npt.NDArray[np.int64], known_N: npt.NDArray[np.bool_]) -> pa.Array:
        if not len(self.value_S):
            return pa.nulls(len(slot_N), self.dtype)
        values = self.value_S[slot_N]
        values[~known_N] = None
        return pa.array(values.tolist(), self.dtype)


def _column(dtype: pa.DataType) -> _FixedColumn | _ObjectColumn:
    return _FixedColumn(dtype) if pa.types.is_int64(dtype) or pa.types.is_float64(dtype) else _ObjectColumn(dtype)


def _sized(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    if size <= len(values):
        return values
    grown = np.zeros(max(size, 2 * len(values), 1024), values.dtype)
    grown[: len(values)] = values
    return grown


def _row_bytes(rows: pa.RecordBatch) -> npt.NDArray[np.int64]:
    total = np.full(rows.num_rows, ROW_OVERHEAD_BYTES, np.int64)
    for array in rows.columns:
        if pa.types.is_string(array.type):
            total += OBJECT_BYTES + pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
        elif pa.types.is_list(array.type):
            total += OBJECT_BYTES + 2 * OBJECT_BYTES * pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        else:
            total += 9
    return total


def load_items(path: str | Path, item_schema: pa.Schema, *, key: str, capacity_bytes: int) -> FeatureCache:
    """Cache filled from a Parquet file of items; columns that `item_schema` lacks are left out.

    Rows are read until the cache is full; a warning says how many fitted. Raises DataError for a file that cannot be read, lacks
    `key`, or holds a value of the wrong type.
    """
    try:
        with pq.ParquetFile(path) as file:
            given = file.schema_arrow
            if key not in given.names:
                raise DataError(f"{path}: key column {key!r} is missing; {nearest(key, given.names)}")
            schema = _kept(given, item_schema, key)
            if schema.names == [key] and len(item_schema) > 1:
                raise DataError(f"{path}: holds none of the item features {', '.join(item_schema.names)}")
            cache = FeatureCache(schema, key=key, capacity_bytes=capacity_bytes)
            _fill(cache, file.iter_batches(LOAD_BATCH_ROWS, columns=schema.names), file.metadata.num_rows, path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return cache


def _kept(given: pa.Schema, item_schema: pa.Schema, key: str) -> pa.Schema:
    kept = [field for field in item_schema if field.name in given.names]
    if key not in item_schema.names:
        is_number = pa.types.is_integer(given.field(key).type)
        kept.append(pa.field(key, pa.int64() if is_number else pa.string()))
    return pa.schema(kept)


def _fill(cache: FeatureCache, batches: Iterable[pa.RecordBatch], num_rows: int, path: str | Path) -> None:
    for batch in batches:
        columns = [conform(batch.column(field.name), field.type, field.name) for field in cache.schema]
        if cache.put(pa.RecordBatch.from_arrays(columns, schema=cache.schema)):
            held = cache.stats().entities
            log.warning("%s: %d of %d rows fit into the feature cache of %d bytes", path, held, num_rows, cache.capacity_bytes)
            return
