"""The stream of rows to be written: `prefix:item!updates`, entries of one field `row`, a JSON object of an entity's columns.

    XADD ninerank:item!updates * row '{"item_id": "i7", "price": 2.5, "tags": ["new"]}'
    XADD ninerank:item!updates * row '{"item_id": "i8"}' op delete

A row replaces the whole value: columns that it lacks are missing from then on. `time`, Unix microseconds, says when it held (default: when
it was added); the entry's own order decides, not the time. Entries are taken as one of a consumer group, so that several processes share
the work, and what one of them had taken when it died is taken by the next that starts under its name. Each is acknowledged once it is
written and the servers are told.
"""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ninerank.errors import DataError
from ninerank.features.columns import conform
from ninerank.predictor.cache.changes import announce
from ninerank.predictor.cache.client import connect, failing
from ninerank.predictor.cache.endpoint import RedisEndpoint
from ninerank.predictor.cache.keys import Keys
from ninerank.predictor.cache.value import RowFormat

__all__ = ["UpdateWatcher", "Watched"]

log = logging.getLogger(__name__)

GROUP = "ninerank"
READ_ENTRIES = 500
BLOCK_MS = 1_000
AGAIN_S = 1.0
DELETE = "delete"


@dataclass(frozen=True)
class Watched:
    """Counters since the start. refused: entries that are no rows; each is logged, acknowledged and passed over."""

    written: int = 0
    deleted: int = 0
    refused: int = 0


class UpdateWatcher:
    """Writes what a stream of rows says, and tells the servers. schema: the columns of a value, with `key`."""

    def __init__(self, endpoint: RedisEndpoint, schema: pa.Schema, *, kind: str, key: str, consumer: str) -> None:
        self._endpoint, self._keys, self._kind = endpoint, Keys(endpoint, kind), kind
        self._schema, self._key, self._consumer = schema, key, consumer
        self._format = RowFormat(schema.remove(schema.get_field_index(key)))
        self.watched = Watched()

    def run(self, done: threading.Event, told: Callable[[Watched], None] = lambda watched: None, *, until_empty: bool = False) -> Watched:
        """Follow the stream until `done`, or once nothing waits. told: of each batch. A Redis that goes away is waited for.

        Raises DataError where it is not there at the start.
        """
        from redis.exceptions import RedisError

        client: Any = connect(self._endpoint)
        self._make_group(client)
        position = "0"  # first what this consumer had taken and not acknowledged
        while not done.is_set():
            try:
                entries = self._read(client, position)
                if entries:
                    self._write(client, entries)
                    told(self.watched)
                elif position == "0":
                    position = ">"
                elif until_empty:
                    break
            except (RedisError, OSError) as error:
                log.warning("%s: waiting for it", failing(self._endpoint, error))
                done.wait(AGAIN_S)
                position = "0"
                if "NOGROUP" in str(error):
                    self._make_group(client)
        return self.watched

    def _make_group(self, client: Any) -> None:
        from redis.exceptions import RedisError

        try:
            client.xgroup_create(self._keys.updates, GROUP, id="0", mkstream=True)
        except RedisError as error:
            if "BUSYGROUP" not in str(error):
                raise failing(self._endpoint, error) from None

    def _read(self, client: Any, position: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        reply = client.xreadgroup(GROUP, self._consumer, {self._keys.updates: position}, count=READ_ENTRIES, block=BLOCK_MS)
        streams = reply.items() if isinstance(reply, dict) else reply or []
        entries: list[Any] = [entry for _, found in streams for entry in found]
        while len(entries) == 1 and isinstance(entries[0], list):
            entries = entries[0]
        return [(entry, words or {}) for entry, words in entries]

    def _write(self, client: Any, entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> None:
        """Entries in their order: of an entity that comes several times the last one stays."""
        newest: dict[str, bytes | None] = {}
        refused = 0
        for entry, words in entries:
            try:
                entity, value = self._parse(entry, words)
            except (ValueError, DataError) as error:
                refused += 1
                log.warning("%s updates, entry %s: %s", self._kind, entry.decode(), error)
                continue
            newest.pop(entity, None)
            newest[entity] = value
        pipe = client.pipeline(transaction=False)
        for entity, value in newest.items():
            name = self._keys.of(entity.encode())
            if value is None:
                pipe.delete(name)
            else:
                pipe.set(name, value)
        pipe.execute()
        announce(client, self._keys, newest)
        client.xack(self._keys.updates, GROUP, *[entry for entry, _ in entries])
        deleted = sum(value is None for value in newest.values())
        held = self.watched
        self.watched = Watched(held.written + len(newest) - deleted, held.deleted + deleted, held.refused + refused)

    def _parse(self, entry: bytes, words: dict[bytes, bytes]) -> tuple[str, bytes | None]:
        """Id and packed value, None to delete. Raises ValueError or DataError for what is no row."""
        row = json.loads(words.get(b"row", b"").decode())
        if not isinstance(row, dict):
            raise DataError(f"row is {type(row).__name__}, an object of columns is needed")
        for name in row:
            if name not in self._schema.names:
                raise DataError(f"unknown column {name!r}; valid: {', '.join(self._schema.names)}")
        entity = row.get(self._key)
        if entity is None or isinstance(entity, (list, dict)):
            raise DataError(f"column {self._key!r}: an id is needed, {entity!r} is none")
        operation = words.get(b"op", b"").decode()
        if operation == DELETE:
            return str(entity), None
        if operation:
            raise DataError(f"op {operation!r} is none; {DELETE}, or none to write")
        added_ms = int(entry.partition(b"-")[0])
        time_us = int(words[b"time"]) if b"time" in words else added_ms * 1000
        try:
            arrays = [conform(pa.array([row.get(field.name)]), field.type, field.name) for field in self._format.schema]
            (entity_id,) = conform(pa.array([entity]), self._schema.field(self._key).type, self._key).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(str(error)) from None
        if entity_id is None:
            raise DataError(f"column {self._key!r}: an id is needed, {entity!r} is none")
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._format.schema) if arrays else None
        if batch is None:
            raise DataError("there are no columns to keep")
        return str(entity_id), self._format.encode(batch, time_us).to_bytes()[0]
