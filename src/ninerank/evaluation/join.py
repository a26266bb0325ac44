"""A request log joined with streams of labels that came later, however large both are.

    log files   -> candidates, one row each -+-> buckets by a hash of the request -> join, bucket by bucket -> out/date=.../*.parquet
    label files -> rows --------------------+

A bucket holds all that is known of its requests, so buckets are joined one by one, in as many processes as asked, in bounded memory.
What comes out has one row a candidate: request_id, time_us, index, candidate_id, position, propensity, model_name, model_version,
score (score_1, ... of further tasks), a column for each label, and the features that are to be kept.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from typing_extensions import Self

from ninerank.config import Config, read_mapping
from ninerank.errors import DataError, nearest
from ninerank.evaluation.answers import numbers
from ninerank.evaluation.mapmerge import Where, map_parts
from ninerank.evaluation.snapshot import microseconds
from ninerank.features.columns import conform
from ninerank.features.files import reading
from ninerank.features.hashing import hash_strings
from ninerank.files import creating, replacing

__all__ = ["JoinCounts", "LabelStream", "join_log", "read_streams", "stream_of"]

BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 4096
BATCH_REQUESTS = 1024
LABEL_BATCH_ROWS = 1 << 18
MICROSECONDS_A_DAY = 86_400_000_000


class LabelStream(Config):
    """Files of labels and what their columns are called.

    files: Parquet files, or folders of them. request_id, candidate_id: the columns of these ids. labels: label of the result -> column of
    the file, or None where every row stands for a label of 1 (a stream of clicks). time: column of times (timestamps, or microseconds since
    1970), which a window needs. window_s: seconds after the request in which a label counts.
    """

    files: tuple[Path, ...] = Field(min_length=1)
    request_id: str = "request_id"
    candidate_id: str = "candidate_id"
    labels: dict[str, str | None] = Field(min_length=1)
    time: str | None = None
    window_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class _Streams(Config):
    streams: tuple[LabelStream, ...] = Field(min_length=1)


def read_streams(path: str | Path) -> tuple[LabelStream, ...]:
    """Streams of a YAML file: `streams: [{files: [clicks/], labels: {click: null}, time: at, window_s: 86400}, ...]`. Raises DataError."""
    streams = _Streams.parse(read_mapping(Path(path)), str(path)).streams
    folder = Path(path).parent
    return tuple(stream.model_copy(update={"files": tuple(folder / file for file in stream.files)}) for stream in streams)


def stream_of(files: Sequence[Path], label: str, column: str | None, time: str | None, window_s: float | None) -> LabelStream:
    """One stream of one label; raises SpecError for values that do not fit."""
    given = {"files": [str(file) for file in files], "labels": {label: column}, "time": time, "window_s": window_s}
    return LabelStream.parse(given, "labels")


@dataclass
class JoinCounts:
    """What was met. rows: labels that came, each of a row's counted. duplicates: those whose candidate had one before; a positive one wins.
    late, early: those outside the window, or before the request. orphans: those that met no candidate. positives: candidates with a
    positive one, by label.
    """

    requests: int = 0
    candidates: int = 0
    rows: int = 0
    duplicates: int = 0
    late: int = 0
    early: int = 0
    orphans: int = 0
    positives: dict[str, int] = field(default_factory=dict)

    def merge(self, other: Self) -> Self:
        for name in ("requests", "candidates", "rows", "duplicates", "late", "early", "orphans"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.positives = {
            name: self.positives.get(name, 0) + other.positives.get(name, 0) for name in {**self.positives, **other.positives}
        }
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Spread:
    """Rows of one file to buckets. stream: None for a log file."""

    file: Path
    number: int
    stream: LabelStream | None
    keep: tuple[str, ...]
    num_buckets: int
    work: Path


@dataclass(frozen=True)
class _Bucket:
    number: int
    streams: tuple[LabelStream, ...]
    work: Path
    out: Path


def join_log(
    log: str | Path,
    streams: Sequence[LabelStream],
    out: str | Path,
    *,
    keep: Sequence[str] = (),
    processes: int = 1,
    where: Where = "local",
    on_part: Callable[[int, int], None] = lambda _done, _total: None,
) -> JoinCounts:
    """Join and write the folder `out`, which appears when it is whole. on_part: is told how many of how many parts are done.

    keep: features to carry along, of either side. Candidates without a label get 0. Raises DataError for missing columns, labels outside
    {0, 1}, damaged files, and where `out` is there.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out}: is there already; a join is written to a new folder")
    log_files = _files(Path(log))
    label_files = [(stream, file) for stream in streams for path in stream.files for file in _files(path)]
    labels = [label for stream in streams for label in stream.labels]
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(f"label {label!r} is in two streams; list their files in one")
    for stream in streams:
        if stream.window_s is not None and stream.time is None:
            raise DataError(f"window_s = {stream.window_s:g} needs the labels' column of times; name it (time)")
    num_bytes = sum(file.stat().st_size for file in (*log_files, *(file for _, file in label_files)))
    num_buckets = min(MAX_BUCKETS, max(1, math.ceil(num_bytes / BUCKET_BYTES)))
    with creating(out) as whole, TemporaryDirectory(prefix=".join-", dir=out.absolute().parent) as folder:
        work = Path(folder)
        sources = [(None, file) for file in log_files] + label_files
        spread = [_Spread(file, n, stream, tuple(keep), num_buckets, work) for n, (stream, file) in enumerate(sources)]
        total, done = len(spread) + num_buckets, 0
        for _ in map_parts(_spread, spread, processes=processes, where=where):
            on_part(done := done + 1, total)
        counts = []
        for _, found in map_parts(
            _join, [_Bucket(n, tuple(streams), work, whole) for n in range(num_buckets)], processes=processes, where=where
        ):
            counts.append(found)
            on_part(done := done + 1, total)
        merged = reduce(JoinCounts.merge, counts, JoinCounts())
        if merged.candidates == 0:
            raise DataError(f"{log}: holds no candidates")
        if merged.orphans == merged.rows and merged.rows:
            raise DataError(f"none of the {merged.rows} labels met a request of {log}; are request and candidate ids the same?")
        with replacing(whole / "join.json") as temporary:
            temporary.write_text(json.dumps(merged.as_dict(), indent=1) + "\n", encoding="utf-8")
    return merged


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: is not there")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: holds no *.parquet file")
    return files


def _spread(part: _Spread) -> int:
    """Write the file's rows to one file a bucket; returns their number."""
    writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
    kind, count = "log" if part.stream is None else "labels", 0
    tables = _candidates(part) if part.stream is None else _labels(part.file, part.stream)
    try:
        for table in tables:
            count += table.num_rows
            bucket_N = hash_strings(table.column("request_id").combine_chunks()) % np.uint64(part.num_buckets)
            for bucket in np.unique(bucket_N).tolist():
                rows = table.filter(pa.array(bucket_N == bucket))
                if bucket not in writers:
                    writers[bucket] = pa.ipc.new_file(part.work / f"{kind}-{bucket:04d}-{part.number:06d}.arrow", rows.schema)
                writers[bucket].write_table(rows)
    finally:
        for writer in writers.values():
            writer.close()
    return count


def _candidates(part: _Spread) -> Iterator[pa.Table]:
    """A log file's candidates, one row each."""
    with reading(part.file, "a request log"), pq.ParquetFile(part.file) as file:
        metadata = file.schema_arrow.metadata or {}
        if b"num_tasks" not in metadata:
            raise DataError(f"{part.file}: is no request log")
        num_tasks = int(metadata[b"num_tasks"])
        for batch in file.iter_batches(BATCH_REQUESTS):
            yield _exploded(batch, num_tasks, part.keep, part.file)


def _exploded(batch: pa.RecordBatch, num_tasks: int, keep: Sequence[str], file: Path) -> pa.Table:
    count_R = batch.column("num_candidates").to_numpy()
    request_N = np.repeat(np.arange(batch.num_rows), count_R)
    index_N = np.arange(len(request_N)) - np.repeat(np.cumsum(count_R) - count_R, count_R)
    parents = pa.array(request_N)
    columns: dict[str, pa.Array] = {
        name: batch.column(name).take(parents) for name in ("request_id", "time_us", "model_name", "model_version")
    }
    columns["index"] = pa.array(index_N, pa.int32())
    ids = batch.column("candidate_ids")
    known_R = ids.is_valid().to_numpy(zero_copy_only=False)
    id_N = np.full(len(request_N), None, object)
    id_N[known_R[request_N]] = ids.flatten().cast(pa.string()).to_numpy(zero_copy_only=False)
    columns["candidate_id"] = pa.array(id_N, pa.string())
    score_NT = batch.column("scores").flatten().to_numpy().reshape(-1, num_tasks)
    for task in range(num_tasks):
        columns["score" if task == 0 else f"score_{task}"] = pa.array(score_NT[:, task])
    if "positions" in batch.schema.names:
        columns["position"] = batch.column("positions").flatten()
        chances = batch.column("propensities")
        chance_N = np.full(len(request_N), np.nan)
        chance_N[chances.is_valid().to_numpy(zero_copy_only=False)[request_N]] = chances.flatten().to_numpy()
        columns["propensity"] = pa.array(chance_N, mask=np.isnan(chance_N))
    for name in keep:
        columns[name] = _feature(batch, name, parents, file)
    return pa.table(columns)


def _feature(batch: pa.RecordBatch, name: str, parents: pa.Array, file: Path) -> pa.Array:
    known = []
    for side in ("user", "item"):
        struct = batch.column(side)
        fields = [] if pa.types.is_null(struct.type) else [own.name for own in struct.type]
        if name in fields:
            values = pc.struct_field(struct, name)
            return values.take(parents) if side == "user" else values.flatten()
        known += fields
    raise DataError(f"{file}: no logged feature is called {name!r}; {nearest(name, known)}")


def _labels(file: Path, stream: LabelStream) -> Iterator[pa.Table]:
    wanted = [stream.request_id, stream.candidate_id, *filter(None, (stream.time, *stream.labels.values()))]
    with reading(file, "labels"), pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        for name in wanted:
            if name not in names:
                raise DataError(f"{file}: column {name!r} is missing; {nearest(name, names)}")
        for batch in parquet.iter_batches(LABEL_BATCH_ROWS, columns=list(dict.fromkeys(wanted))):
            columns = {}
            for name, own in (("request_id", stream.request_id), ("candidate_id", stream.candidate_id)):
                columns[name] = conform(batch.column(own), pa.string(), own)
                if columns[name].null_count:
                    raise DataError(f"{file}: column {own!r} holds nulls; each label names its request and candidate")
            if stream.time is not None:
                columns["label_time_us"] = _times(batch.column(stream.time), stream.time, file)
            for label, column in stream.labels.items():
                value_N = np.ones(batch.num_rows) if column is None else numbers(batch, column)
                wrong = np.flatnonzero((value_N != 0) & (value_N != 1))
                if len(wrong):
                    raise DataError(f"{file}: column {column!r}: {value_N[wrong[0]]:g} is refused; a label is 0 or 1")
                columns[label] = pa.array(value_N.astype(np.int8))
            yield pa.table(columns)


def _times(array: pa.Array, name: str, file: Path) -> pa.Array:
    array = microseconds(array, name, file)
    if array.null_count:
        raise DataError(f"{file}: column {name!r} holds nulls; each label has its time")
    return array


def _join(part: _Bucket) -> JoinCounts:
    """Join one bucket, write its rows by date, count."""
    candidates = _gathered(part.work, "log", part.number)
    if candidates is None:
        rows = _gathered(part.work, "labels", part.number)
        lost = 0 if rows is None else rows.num_rows
        return JoinCounts(rows=lost, orphans=lost)
    counts = JoinCounts(requests=len(pc.unique(candidates["request_id"])), candidates=candidates.num_rows)
    labels = _gathered(part.work, "labels", part.number)
    for stream in part.streams:
        for label in stream.labels:
            known = labels is not None and label in labels.column_names
            own = labels.filter(pc.is_valid(labels[label])) if labels is not None and known else None
            candidates = _labelled(candidates, own, label, stream, counts)
    day_N = candidates["time_us"].to_numpy() // MICROSECONDS_A_DAY
    for day in np.unique(day_N).tolist():
        folder = part.out / f"date={np.datetime64(day, 'D')}"
        folder.mkdir(exist_ok=True)
        pq.write_table(candidates.filter(pa.array(day_N == day)), folder / f"part-{part.number:04d}.parquet", compression="zstd")
    return counts


def _gathered(work: Path, kind: str, bucket: int) -> pa.Table | None:
    tables = []
    for file in sorted(work.glob(f"{kind}-{bucket:04d}-*.arrow")):
        with pa.OSFile(str(file)) as source:
            tables.append(pa.ipc.open_file(source).read_all())
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def _labelled(candidates: pa.Table, labels: pa.Table | None, label: str, stream: LabelStream, counts: JoinCounts) -> pa.Table:
    """The candidates with a column more: 1 where a label in the window says so, else 0."""
    keys = ["request_id", "candidate_id"]
    value_N = np.zeros(candidates.num_rows, np.int8)
    if labels is not None and labels.num_rows:
        counts.rows += labels.num_rows
        numbered = candidates.select([*keys, "time_us"]).append_column("row", pa.array(np.arange(candidates.num_rows)))
        met = labels.join(numbered, keys, join_type="left outer")
        known_M = met["row"].is_valid().to_numpy()
        counts.orphans += int((~known_M).sum())
        inside_M = known_M
        if stream.time is not None:
            after_M = met["label_time_us"].to_numpy() - met["time_us"].fill_null(0).to_numpy()
            early_M = known_M & (after_M < 0)
            late_M = known_M & (after_M > (math.inf if stream.window_s is None else stream.window_s * 1e6))
            counts.early += int(early_M.sum())
            counts.late += int(late_M.sum())
            inside_M = known_M & ~early_M & ~late_M
        row_M, own_M = met["row"].fill_null(0).to_numpy()[inside_M], met[label].to_numpy()[inside_M]
        counts.duplicates += len(row_M) - len(np.unique(row_M))
        np.maximum.at(value_N, row_M, own_M)
    counts.positives[label] = counts.positives.get(label, 0) + int(value_N.sum())
    return candidates.append_column(label, pa.array(value_N))
