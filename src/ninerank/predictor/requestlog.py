"""A sampled log of requests as they were scored: Parquet files that replay turns back into the same scores.

One row a request: request_id, time_us, model_name, model_version, spec_digest, user (a struct of the request-level columns),
candidate_ids, item (a struct of lists, one list a column, N values each: what the model saw after the cache), scores (N * T, row by row),
positions (place of each candidate in the order that was returned, from 0), propensities (chance with which the caller showed each
candidate where it did; null where nobody said), defaulted (columns in neither request nor cache), unknown (candidates that the cache did
not know), stage_us (a struct of microseconds).

Shape legend: N candidates, T tasks.
"""

import itertools
import json
import logging
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from typing_extensions import Self

from ninerank.config import Config
from ninerank.errors import DataError
from ninerank.files import replacing
from ninerank.predictor.request import RankInput, RequestSchema, record_batch

__all__ = ["LogConfig", "LogStats", "LoggedRequest", "RequestLog", "read_log"]

log = logging.getLogger(__name__)

FORMAT = b"ninerank.requestlog"
FORMAT_VERSION = b"2"
READABLE = (b"1", FORMAT_VERSION)
CLOSE = None


class LogConfig(Config):
    """sample_rate: share of requests that are logged. A file is closed after max_rows requests, max_bytes of them, or max_seconds,
    whichever comes first.

    queue_requests: requests that may wait for the writer; beyond that they are dropped and counted.
    """

    sample_rate: float = Field(default=1.0, ge=0, le=1)
    max_rows: int = Field(default=5_000, ge=1)
    max_bytes: int = Field(default=64 << 20, ge=1, description="of features in memory, before compression")
    max_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    queue_requests: int = Field(default=1_000, ge=1)


@dataclass(frozen=True)
class LoggedRequest:
    """One request with what it was answered. time_us: Unix time, microseconds.

    candidate_ids: as sent, else the column of item ids that came inline, else None. propensity_N: float64, None where nobody said.
    defaulted: columns that neither request nor cache held. unknown: candidates, by index, that the cache did not know. times_us: by stage.
    """

    request_id: str
    time_us: int
    model_name: str
    model_version: str
    spec_digest: str
    candidate_ids: pa.Array | None
    input: RankInput
    scores_NT: npt.NDArray[np.float32]
    propensity_N: npt.NDArray[np.float64] | None = None
    defaulted: tuple[str, ...] = ()
    unknown: tuple[int, ...] = ()
    times_us: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LogStats:
    """Requests written, dropped because the writer could not follow, and lost because a file could not be written."""

    written: int
    dropped: int
    failed: int
    files: int


class RequestLog:
    """Writes requests of one spec to `directory` from a thread of its own; `write` never waits.

    Files appear under their final name only once they are whole. `close` writes what waits. Use it as a context manager.
    """

    def __init__(self, directory: str | Path, schema: RequestSchema, num_tasks: int, config: LogConfig | None = None) -> None:
        self.directory = Path(directory)
        self.config = config or LogConfig()
        self._schema, self._num_tasks = schema, num_tasks
        self._random = random.Random(secrets.randbits(64))
        self._queue: queue.Queue[LoggedRequest | None] = queue.Queue(self.config.queue_requests)
        self._written = self._dropped = self._failed = self._files = 0
        self._count = threading.Lock()
        self._closed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.directory}: cannot hold the request log ({error.strerror})") from None
        self._thread = threading.Thread(target=self._work, name="requestlog", daemon=True)
        self._thread.start()

    def write(self, request: LoggedRequest) -> bool:
        """Log the request if it is drawn and the writer can follow; whether it was taken."""
        if self._closed or self._random.random() >= self.config.sample_rate:
            return False
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            with self._count:
                self._dropped += 1
            return False
        return True

    def stats(self) -> LogStats:
        """Counters since the start."""
        with self._count:
            return LogStats(self._written, self._dropped, self._failed, self._files)

    def close(self) -> None:
        """Write what waits and stop; further requests are not taken."""
        if not self._closed:
            self._closed = True
            self._queue.put(CLOSE)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _work(self) -> None:
        waiting: list[LoggedRequest] = []
        due, num_bytes = float("inf"), 0
        while True:
            try:
                request = self._queue.get(timeout=max(0.0, min(due - time.monotonic(), 3600.0)))
            except queue.Empty:
                self._flush(waiting)
                due = float("inf")
                continue
            if request is CLOSE:
                self._flush(waiting)
                return
            if not waiting:
                due, num_bytes = time.monotonic() + self.config.max_seconds, 0
            waiting.append(request)
            num_bytes += request.input.items.nbytes + request.input.user.nbytes
            if len(waiting) >= self.config.max_rows or num_bytes >= self.config.max_bytes:
                self._flush(waiting)
                due = float("inf")

    def _flush(self, waiting: list[LoggedRequest]) -> None:
        if not waiting:
            return
        # Names sort by time, and no two servers that share a directory make the same one.
        target = self.directory / f"requests-{waiting[0].time_us:017d}-{secrets.token_hex(4)}.parquet"
        try:
            table = to_table(waiting, self._schema, self._num_tasks)
            with replacing(target) as temporary:
                pq.write_table(table, temporary, compression="zstd")
        except Exception:  # a full disk must not end the thread that will write the next file
            log.exception("%s: %d requests are lost", target, len(waiting))
            with self._count:
                self._failed += len(waiting)
        else:
            with self._count:
                self._written += len(waiting)
                self._files += 1
        waiting.clear()


def to_table(requests: Sequence[LoggedRequest], schema: RequestSchema, num_tasks: int) -> pa.Table:
    """The log's table of some requests."""
    counts = np.array([request.input.items.num_rows for request in requests], np.int64)
    users = pa.Table.from_batches([request.input.user for request in requests], schema.request).combine_chunks()
    items = pa.Table.from_batches([request.input.items for request in requests], schema.item).combine_chunks()
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    scores = np.concatenate([request.scores_NT.reshape(-1) for request in requests])
    columns = {
        "request_id": pa.array([request.request_id for request in requests], pa.string()),
        "time_us": pa.array([request.time_us for request in requests], pa.int64()),
        "model_name": pa.array([request.model_name for request in requests], pa.string()),
        "model_version": pa.array([request.model_version for request in requests], pa.string()),
        "spec_digest": pa.array([request.spec_digest for request in requests], pa.string()),
        "user": _struct(schema.request, [_whole(users.column(name)) for name in schema.request.names], len(requests)),
        "candidate_ids": _candidate_ids(requests),
        "num_candidates": pa.array(counts, pa.int64()),
        "item": _struct(
            schema.item, [pa.ListArray.from_arrays(offsets, _whole(items.column(name))) for name in schema.item.names], len(requests)
        ),
        "scores": pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts * num_tasks)]), pa.int32()), pa.array(scores)),
        "positions": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([_positions(r.scores_NT) for r in requests]), pa.int32())),
        "propensities": pa.array([request.propensity_N for request in requests], pa.list_(pa.float64())),
        "defaulted": pa.array([request.defaulted for request in requests], pa.list_(pa.string())),
        "unknown": pa.array([request.unknown for request in requests], pa.list_(pa.int32())),
        "stage_us": _stages(requests),
    }
    metadata = {FORMAT: FORMAT_VERSION, b"num_tasks": str(num_tasks).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def read_log(path: str | Path, shard: tuple[int, int] = (0, 1)) -> Iterator[LoggedRequest]:
    """Requests of a log file, or of all the log files of a directory in the order of their names, which is that of time.

    shard: (k, n) reads the k-th of n shares, dealt out 256 requests at a time.
    Raises DataError for a path that is not there or holds no log, and for a file that is truncated, corrupt or of another kind.
    """
    root = Path(path)
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{root}: holds no *.parquet file of a request log")
    turn, (own, shares) = itertools.count(), shard
    for file in files:
        yield from _read_file(file, lambda: next(turn) % shares == own)


def _read_file(path: Path, is_ours: Callable[[], bool]) -> Iterator[LoggedRequest]:
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
            if metadata.get(FORMAT) not in READABLE:
                raise DataError(f"{path}: is no request log of format {' or '.join(version.decode() for version in READABLE)}")
            num_tasks = int(json.loads(metadata[b"num_tasks"]))
            for batch in file.iter_batches(batch_size=256):
                for row in range(batch.num_rows if is_ours() else 0):
                    yield _logged(batch, row, num_tasks)
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are ValueErrors or OSErrors
        raise DataError(f"{path}: cannot be read as a request log ({error})") from None


def _logged(batch: pa.RecordBatch, row: int, num_tasks: int) -> LoggedRequest:
    def text(name: str) -> str:
        return str(batch.column(name)[row].as_py())

    count = batch.column("num_candidates")[row].as_py()
    ids = batch.column("candidate_ids")
    user = _unpack(batch.column("user").slice(row, 1))
    items = {name: column.flatten() for name, column in _unpack(batch.column("item").slice(row, 1)).items()}
    scores = batch.column("scores").slice(row, 1).flatten().to_numpy()
    if len(scores) != count * num_tasks or any(len(column) != count for column in items.values()):
        raise DataError(f"request {text('request_id')!r}: its columns hold other numbers of candidates than {count}")
    return LoggedRequest(
        request_id=text("request_id"),
        time_us=batch.column("time_us")[row].as_py(),
        model_name=text("model_name"),
        model_version=text("model_version"),
        spec_digest=text("spec_digest"),
        candidate_ids=ids.slice(row, 1).flatten() if ids[row].is_valid else None,
        input=RankInput(_batch(user, 1), _batch(items, count)),
        scores_NT=scores.reshape(count, num_tasks),
        **(_circumstances(batch, row, count) if "positions" in batch.schema.names else {}),
    )


def _circumstances(batch: pa.RecordBatch, row: int, count: int) -> dict[str, Any]:
    """What format 2 holds of a request beside features and scores."""
    propensities = batch.column("propensities").slice(row, 1)
    if propensities.null_count == 0 and len(propensities.flatten()) != count:
        raise DataError(
            f"request {batch.column('request_id')[row].as_py()!r}: has propensities of another number of candidates than {count}"
        )
    return {
        "propensity_N": None if propensities.null_count else propensities.flatten().to_numpy(),
        "defaulted": tuple(batch.column("defaulted")[row].as_py()),
        "unknown": tuple(batch.column("unknown")[row].as_py()),
        "times_us": {name: value for name, value in (batch.column("stage_us")[row].as_py() or {}).items() if value is not None},
    }


def _positions(scores_NT: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Place of each candidate in the order by the first task, ties by index, as the server orders."""
    order = np.argsort(-scores_NT[:, 0], kind="stable")
    position_N = np.empty_like(order)
    position_N[order] = np.arange(len(order))
    return position_N


def _stages(requests: Sequence[LoggedRequest]) -> pa.Array:
    names = sorted({name for request in requests for name in request.times_us})
    arrays = [pa.array([request.times_us.get(name) for request in requests], pa.int64()) for name in names]
    return pa.StructArray.from_arrays(arrays, names=names) if names else pa.nulls(len(requests))


def _struct(schema: pa.Schema, arrays: list[pa.Array], num_rows: int) -> pa.Array:
    if not arrays:  # Parquet has no struct without fields
        return pa.nulls(num_rows)
    return pa.StructArray.from_arrays(arrays, names=schema.names)


def _unpack(struct: pa.Array) -> Mapping[str, pa.Array]:
    return {} if pa.types.is_null(struct.type) else dict(zip([f.name for f in struct.type], struct.flatten(), strict=True))


def _batch(columns: Mapping[str, pa.Array], num_rows: int) -> pa.RecordBatch:
    schema = pa.schema([(name, array.type) for name, array in columns.items()])
    return record_batch(list(columns.values()), schema, num_rows)


def _candidate_ids(requests: Sequence[LoggedRequest]) -> pa.Array:
    """Lists of ids; strings where some requests sent strings and others integers."""
    arrays = [request.candidate_ids for request in requests if request.candidate_ids is not None]
    is_number = bool(arrays) and all(pa.types.is_int64(array.type) for array in arrays)
    dtype = pa.int64() if is_number else pa.string()
    values = pa.concat_arrays([array.cast(dtype) for array in arrays]) if arrays else pa.nulls(0, dtype)
    lengths = np.array([0 if request.candidate_ids is None else len(request.candidate_ids) for request in requests], np.int64)
    missing = pa.array([request.candidate_ids is None for request in requests])
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values, mask=missing)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
