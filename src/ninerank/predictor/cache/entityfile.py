"""Parquet files of entities, one row each: filled into a cache that lives in memory alone, or read batch by batch for a store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ninerank.errors import DataError, nearest
from ninerank.features.columns import conform
from ninerank.predictor.cache.lookup import FeatureCache

__all__ = ["EntityFile", "key_field", "load_items", "open_entities"]

log = logging.getLogger(__name__)

LOAD_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class EntityFile:
    """An open file of entities. schema: the columns that are read, with the types they are read as. columns it lacks are missing."""

    path: Path
    file: pq.ParquetFile
    schema: pa.Schema

    @property
    def num_rows(self) -> int:
        return int(self.file.metadata.num_rows)

    def batches(self, batch_rows: int = LOAD_BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Rows as `schema` has them. Raises DataError for a value of the wrong type."""
        held = [name for name in self.schema.names if name in self.file.schema_arrow.names]
        first_row = 0
        for batch in self.file.iter_batches(batch_rows, columns=held):
            arrays = []
            for field in self.schema:
                index = batch.schema.get_field_index(field.name)
                array = pa.nulls(batch.num_rows, field.type) if index < 0 else batch.column(index)
                try:
                    arrays.append(conform(array, field.type, field.name, None, first_row))
                except (DataError, pa.ArrowInvalid) as error:
                    raise DataError(f"{self.path}: {error}") from None
            yield pa.RecordBatch.from_arrays(arrays, schema=self.schema)
            first_row += batch.num_rows


@contextmanager
def open_entities(path: str | Path, wanted: pa.Schema, *, key: str, fill: bool = False) -> Iterator[EntityFile]:
    """The file's columns that `wanted` has, and `key`. fill: the columns that the file lacks too, missing in every row.

    Raises DataError for a file that cannot be read, lacks `key`, or holds none of the features.
    """
    try:
        with pq.ParquetFile(path) as file:
            given = file.schema_arrow
            if key not in given.names:
                raise DataError(f"{path}: key column {key!r} is missing; {nearest(key, given.names)}")
            present = [field for field in wanted if field.name in given.names and field.name != key]
            if not present and set(wanted.names) - {key}:
                raise DataError(f"{path}: holds none of the features {', '.join(wanted.names)}")
            features = [field for field in wanted if field.name != key] if fill else present
            yield EntityFile(Path(path), file, pa.schema([key_field(wanted, key, given), *features]))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def key_field(wanted: pa.Schema, key: str, given: pa.Schema) -> pa.Field:
    """The key column: of the type that the feature has, or, where it is no feature, int64 or string as the file has it."""
    if key in wanted.names:
        return wanted.field(key)
    return pa.field(key, pa.int64() if pa.types.is_integer(given.field(key).type) else pa.string())


def load_items(
    path: str | Path, item_schema: pa.Schema, *, key: str, capacity_bytes: int, shared: str | None = None, called: str = "candidate ids"
) -> FeatureCache:
    """Cache filled from a Parquet file of items (or users); columns that `item_schema` lacks are left out.

    shared: memory of another process that filled it from this file; nothing is read then.

    Rows are read until the cache is full; a warning says how many fitted. Raises DataError for a file that cannot be read, lacks
    `key`, or holds a value of the wrong type.
    """
    with open_entities(path, item_schema, key=key) as entities:
        cache = FeatureCache(entities.schema, key=key, capacity_bytes=capacity_bytes, shared=shared, called=called)
        for batch in () if cache.is_shared else entities.batches():
            if cache.put(batch):
                held = cache.stats().entities
                log.warning(
                    "%s: %d of %d rows fit into the feature cache of %d bytes", path, held, entities.num_rows, cache.stats().capacity_bytes
                )
                break
    return cache
