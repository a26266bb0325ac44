"""Both models' scores of every labelled candidate of a log.

Shape legend: N candidates of a request, M labelled candidates of all requests, R requests.
"""

import hashlib
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Self

from ninerank.errors import DataError, nearest
from ninerank.evaluation.joined import JoinStats, Labels
from ninerank.evaluation.mapmerge import Where, map_parts
from ninerank.evaluation.replay import Unlabelled

if TYPE_CHECKING:
    from ninerank.predictor.engine import Engine
    from ninerank.predictor.request import RankInput, RequestSchema
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["Changed", "CompareJob", "Compared", "conformed", "score_both"]

MAX_SAMPLES = 5
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CompareJob:
    """a, b: bundles; None for a: the scores as they were served. slices: logged features by whose values results are broken down."""

    log: Path
    labels: Path
    b: Path
    a: Path | None = None
    device: str = "auto"
    unlabelled: Unlabelled = "skip"
    slices: tuple[str, ...] = ()
    top_k: int = 10
    shard: tuple[int, int] = (0, 1)


@dataclass(order=True)
class Changed:
    """A request by how far its scores moved."""

    change: float
    request_id: str
    request: "LoggedRequest" = field(compare=False)
    label_N: Array = field(compare=False)
    a_N: Array = field(compare=False)
    b_N: Array = field(compare=False)


@dataclass
class Compared:
    """label_M: 0 or 1. a_M, b_M: float32 scores of the first task. request_M: int64, a hash of the request's id. slices: values by column.

    a_us_R, b_us_R: time a request takes each model, nan for served scores. a_items, b_items: ids among the first k. num_defaulted:
    candidates that took a default. changed: the requests whose scores moved most. absent: columns that a model reads and the log lacks.
    """

    label_M: Array
    a_M: Array
    b_M: Array
    request_M: Array
    slices: dict[str, pa.ChunkedArray]
    a_us_R: Array
    b_us_R: Array
    a_items: set[object]
    b_items: set[object]
    num_requests: int
    num_candidates: int
    num_defaulted: int
    changed: list[Changed]
    absent: dict[str, tuple[str, ...]]
    joined: JoinStats

    def merge(self, other: Self) -> Self:
        """Both shares of one log as one."""
        for name in ("label_M", "a_M", "b_M", "request_M", "a_us_R", "b_us_R"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        self.slices = {name: pa.chunked_array([*values.chunks, *other.slices[name].chunks]) for name, values in self.slices.items()}
        self.a_items |= other.a_items
        self.b_items |= other.b_items
        for name in ("num_requests", "num_candidates", "num_defaulted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.changed = heapq.nlargest(MAX_SAMPLES, [*self.changed, *other.changed])
        self.joined = self.joined.merge(other.joined)
        return self


def score_both(
    job: CompareJob, *, processes: int = 1, where: Where = "local", on_requests: Callable[[int], None] = lambda _: None
) -> Compared:
    """Score the log by both models. Raises DataError for an empty log, labels that meet nothing, or a slice that is no logged feature."""
    if processes == 1 and where == "local":
        whole = _share(job, on_requests)
    else:
        parts = [replace(job, shard=(k, processes)) for k in range(processes)]
        shares = [own for _, own in map_parts(_share, parts, processes=processes, where=where)]
        whole = shares[0]
        for own in shares[1:]:
            whole.merge(own)
    if whole.num_requests == 0:
        raise DataError(f"{job.log}: holds no requests")
    if len(whole.label_M) == 0:
        raise DataError(f"none of the {whole.joined.rows} labels met a request of {job.log}; are request and candidate ids the same?")
    return whole


def _share(job: CompareJob, on_requests: Callable[[int], None] = lambda _: None) -> Compared:
    import torch

    from ninerank.predictor.engine import Engine
    from ninerank.predictor.requestlog import read_log

    torch.set_num_threads(1)
    b = Engine.load(job.b, job.device)
    a = None if job.a is None else Engine.load(job.a, job.device)
    tasks = [tuple(engine.manifest.tasks) for engine in (a, b) if engine is not None]
    if tasks[0][0] != tasks[-1][0]:
        raise DataError(f"the models' first tasks are {tasks[0][0]!r} and {tasks[-1][0]!r}; they are compared by one label")
    collected = _Collected(job, a, b, Labels(job.labels, tasks[-1][:1]))
    for request in read_log(job.log, job.shard):
        collected.add(request)
        on_requests(1)
    return collected.done()


class _Collected:
    def __init__(self, job: CompareJob, a: "Engine | None", b: "Engine", labels: Labels) -> None:
        self._job, self._a, self._b, self._labels = job, a, b, labels
        self._rows: list[tuple[Array, Array, Array, Array]] = []
        self._slices: dict[str, list[pa.Array]] = {name: [] for name in job.slices}
        self._times: list[tuple[float, float]] = []
        self._items: tuple[set[object], set[object]] = (set(), set())
        self._changed: list[Changed] = []
        self._absent: dict[str, tuple[str, ...]] = {}
        self._requests = self._candidates = self._defaulted = 0

    def add(self, request: "LoggedRequest") -> None:
        """Score and keep one request."""
        # Who goes first alternates: the second finds caches warm.
        order: tuple[int, int] = (1, 0) if self._requests % 2 else (0, 1)
        answers: dict[int, tuple[Array, float]] = {side: self._score(side, request) for side in order}
        (a_N, a_us), (b_N, b_us) = answers[0], answers[1]
        count = len(b_N)
        label_N = self._labels.take(request.request_id, request.candidate_ids, count)[:, 0]
        if self._job.unlabelled == "zero":
            label_N = np.nan_to_num(label_N)
        known_N = np.isfinite(label_N)
        key = int.from_bytes(hashlib.blake2b(request.request_id.encode(), digest_size=8).digest(), "little", signed=True)
        self._rows.append((label_N[known_N].astype(np.int8), a_N[known_N], b_N[known_N], np.full(int(known_N.sum()), key, np.int64)))
        chosen = pa.array(np.flatnonzero(known_N))
        for name, values in self._slices.items():
            values.append(_feature(request, name, count).take(chosen))
        self._times.append((a_us, b_us))
        for shown, score_N in zip(self._items, (a_N, b_N), strict=True):
            shown.update(_shown(request, score_N, self._job.top_k))
        self._requests += 1
        self._candidates += count
        self._defaulted += count if set(request.defaulted) & set(request.input.items.schema.names) else len(set(request.unknown))
        change = float(np.abs(a_N.astype(np.float64) - b_N).max(initial=0.0))
        heapq.heappush(self._changed, Changed(change, request.request_id, request, label_N, a_N, b_N))
        if len(self._changed) > MAX_SAMPLES:
            heapq.heappop(self._changed)

    def _score(self, side: int, request: "LoggedRequest") -> tuple[Array, float]:
        """Scores of model A (0) or B (1), and microseconds."""
        engine = (self._a, self._b)[side]
        if engine is None:
            return request.scores_NT[:, 0], float("nan")
        features, absent = conformed(request, engine.schema)
        self._absent.setdefault("ab"[side], absent)
        started = time.perf_counter_ns()
        scores_NT = engine.rank(features).scores_NT
        return scores_NT[:, 0], (time.perf_counter_ns() - started) * 1e-3

    def done(self) -> Compared:
        nothing = (np.empty(0, np.int8), np.empty(0, np.float32), np.empty(0, np.float32), np.empty(0, np.int64))
        label_M, a_M, b_M, request_M = (np.concatenate(column) for column in zip(nothing, *self._rows, strict=True))
        times = np.array(self._times).reshape(-1, 2)
        slices = {name: pa.chunked_array(values or [pa.nulls(0)]) for name, values in self._slices.items()}
        return Compared(
            label_M=label_M,
            a_M=a_M,
            b_M=b_M,
            request_M=request_M,
            slices=slices,
            a_us_R=times[:, 0],
            b_us_R=times[:, 1],
            a_items=self._items[0],
            b_items=self._items[1],
            num_requests=self._requests,
            num_candidates=self._candidates,
            num_defaulted=self._defaulted,
            changed=sorted(self._changed, reverse=True),
            absent=self._absent,
            joined=self._labels.stats,
        )


def conformed(request: "LoggedRequest", schema: "RequestSchema") -> tuple["RankInput", tuple[str, ...]]:
    """The logged features in the columns that a model reads, which may be of another spec; and those that were not logged."""
    from ninerank.predictor.request import RankInput

    if request.input.user.schema.equals(schema.request) and request.input.items.schema.equals(schema.item):
        return request.input, ()
    sides: list[pa.RecordBatch] = []
    absent: list[str] = []
    for side, rows in (("request", request.input.user), ("item", request.input.items)):
        wanted = schema.request.names if side == "request" else schema.item.names
        given = {name: rows.column(name) for name in rows.schema.names if name in wanted}
        found, missing = schema.conform("request" if side == "request" else "item", given, rows.num_rows)
        sides.append(found)
        absent += missing
    return RankInput(*sides), tuple(absent)


def _feature(request: "LoggedRequest", name: str, count: int) -> pa.Array:
    user, items = request.input.user, request.input.items
    if name in items.schema.names:
        return items.column(name)
    if name in user.schema.names:
        return user.column(name).take(pa.array(np.zeros(count, np.int64)))
    names = [*user.schema.names, *items.schema.names]
    raise DataError(f"slice {name!r} is no logged feature; {nearest(name, names)}")


def _shown(request: "LoggedRequest", score_N: Array, top_k: int) -> Sequence[object]:
    if request.candidate_ids is None:
        return ()
    first = np.argsort(-score_N, kind="stable")[:top_k]
    ids: list[object] = request.candidate_ids.take(pa.array(first)).to_pylist()
    return ids
