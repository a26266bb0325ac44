"""Bulk load: a Parquet file of entities into a Redis, pipelined, as fast as is allowed, going on where it was cut off.

How far it came is written beside the values, with each part of them: a load that was cut off is taken up by the same command, from any
machine. At the end come the marks by which servers tell an emptied Redis from one that does not know an id, and word to the servers
that everything changed.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ninerank.errors import DataError
from ninerank.predictor.cache.changes import announce_all
from ninerank.predictor.cache.client import connect, failing
from ninerank.predictor.cache.endpoint import RedisEndpoint
from ninerank.predictor.cache.entityfile import open_entities
from ninerank.predictor.cache.keys import Keys
from ninerank.predictor.cache.value import RowFormat

__all__ = ["LoadReport", "load_entities"]

PART_ROWS = 2_000


@dataclass(frozen=True)
class LoadReport:
    """What a load did. skipped: rows that an earlier load of the same file had written."""

    rows: int
    skipped: int
    value_bytes: int
    seconds: float
    schema_digest: str


def load_entities(
    path: str | Path,
    endpoint: RedisEndpoint,
    wanted: pa.Schema,
    *,
    kind: str,
    key: str,
    rows_per_s: float | None = None,
    restart: bool = False,
    progress: Callable[[int], None] = lambda more: None,
) -> LoadReport:
    """Write every row of `path` as the value of its `key`; columns of `wanted` that the file lacks are missing.

    rows_per_s: at most. restart: begin anew where an earlier load was cut off. progress: told how many more rows are done. The event
    time of the values is that of the start. Raises DataError for a file or a Redis that fails; what was written stays.
    """
    from redis.exceptions import RedisError

    client, keys, started = connect(endpoint), Keys(endpoint, kind), time.time()
    event_time_us, begun = int(started * 1e6), time.monotonic()
    with open_entities(path, wanted, key=key, fill=True) as entities:
        row_format = RowFormat(entities.schema.remove(entities.schema.get_field_index(key)))
        status = Path(path).stat()
        name = f"{Path(path).name} {status.st_size} {status.st_mtime_ns} {row_format.digest.hex()}"
        try:
            skipped = 0 if restart else _done(client, keys, name)
            progress(skipped)
            written = value_bytes = 0
            for part in _parts(entities.batches(), skipped):
                values = row_format.encode(part, event_time_us).to_bytes()
                pipe = client.pipeline(transaction=False)
                for entity, value in zip(part.column(key).to_pylist(), values, strict=True):
                    if entity is None:
                        raise DataError(f"{path}: row {skipped + written}: an entity without id")
                    pipe.set(keys.of(str(entity).encode()), value)
                pipe.set(keys.progress, json.dumps({"file": name, "rows": skipped + written + part.num_rows}))
                pipe.execute()
                written, value_bytes = written + part.num_rows, value_bytes + sum(map(len, values))
                progress(part.num_rows)
                if rows_per_s:
                    time.sleep(max(0.0, written / rows_per_s - (time.monotonic() - begun)))
            report = LoadReport(written, skipped, value_bytes, time.monotonic() - begun, row_format.digest.hex())
            _finish(client, keys, row_format, {**asdict(report), "file": Path(path).name, "loaded_at_s": started})
        except (RedisError, OSError) as error:
            raise failing(endpoint, error) from None
    return report


def _parts(batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        past = min(skip, batch.num_rows)
        skip -= past
        for start in range(past, batch.num_rows, PART_ROWS):
            yield batch.slice(start, PART_ROWS)


def _done(client: Any, keys: Keys, name: str) -> int:
    """Rows of this very file, in this format, that are there already."""
    held = client.get(keys.progress)
    try:
        told = json.loads(held) if held else {}
        return int(told["rows"]) if told.get("file") == name else 0
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0


def _finish(client: Any, keys: Keys, row_format: RowFormat, about: dict[str, Any]) -> None:
    columns = [[field.name, str(field.type)] for field in row_format.schema]
    pipe = client.pipeline(transaction=False)
    for mark in keys.marks():
        pipe.set(mark, b"1")
    pipe.set(keys.about, json.dumps({**about, "columns": columns}))
    pipe.delete(keys.progress)
    pipe.execute()
    announce_all(client, keys)
