"""The answers of one model version: from a request's message to the bytes of its answer; knows nothing of gRPC.

    RankRequest -> columns -> + cached item features -> RankInput -> engine -> RankResponse -> bytes

Computing is a generator (`Steps`) that yields between the parts of a very large request, so that others have their turn.

Shape legend: N candidates, B rows, T tasks.
"""

import copy
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ninerank.errors import DataError, RequestError, nearest
from ninerank.features.spec import Side
from ninerank.predictor.admission import Ask, Steps
from ninerank.predictor.cache import EntityRows, FeatureSource
from ninerank.predictor.cache.entities import default_item_key
from ninerank.predictor.call import Call
from ninerank.predictor.engine import Engine
from ninerank.predictor.explain import explain
from ninerank.predictor.request import RankInput, RankOutput, StageTimes
from ninerank.predictor.requestlog import LoggedRequest, RequestLog
from ninerank.predictor.telemetry import Telemetry
from ninerank.predictor.wire import decode_column
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["RankService"]

MAX_EXPLAINED = 100
PART_ROWS = 2_048
"""Rows that are computed in one turn: a few milliseconds, which others can wait."""


@dataclass(frozen=True)
class _Asked:
    """A rank request as columns. missing: those that nobody sent. items, user: what the cache said of them, if it was asked."""

    input: RankInput
    ids: pa.Array | None
    user_missing: tuple[str, ...]
    item_missing: tuple[str, ...]
    items: EntityRows | None
    user: EntityRows | None
    decoded_ns: int
    cached_ns: int

    @property
    def unknown(self) -> list[int]:
        """Candidates that the cache knows not to exist."""
        if self.items is None:
            return []
        unknown_N = ~self.items.known_N if self.items.failed_N is None else ~(self.items.known_N | self.items.failed_N)
        unknown: list[int] = unknown_N.nonzero()[0].tolist()
        return unknown


class RankService:
    """Answers calls with one engine, from any number of threads at once.

    items: where candidate ids are looked up. item_key: column that candidate ids stand for where there is no `items`. users: where the
    user's features are looked up that a request lacks. release: closes what was opened for the service. merges: let the dispatcher
    compute several rank calls at once.
    """

    def __init__(
        self,
        engine: Engine,
        telemetry: Telemetry,
        *,
        items: FeatureSource | None = None,
        users: FeatureSource | None = None,
        item_key: str | None = None,
        request_log: RequestLog | None = None,
        release: Callable[[], None] | None = None,
        merges: bool = False,
    ) -> None:
        self.engine = engine
        self._release = release
        self.telemetry = telemetry
        self._items, self._users = items, users
        self._user_columns = frozenset(engine.schema.request.names)
        self._item_columns = frozenset(engine.schema.item.names)
        self._item_key = item_key or default_item_key(engine.spec)
        self._log = request_log
        self._merges = merges

    def release(self) -> None:
        """Let go of what was opened for this service and those renewed from it; nobody computes with them any more. Once is enough."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def renewed(self, engine: Engine) -> "RankService":
        """The same service over an engine that has other rows of the same model."""
        service = copy.copy(self)
        service.engine = engine
        return service

    def rank(self, request: pb.RankRequest, call: Call) -> Steps:
        """Serialised RankResponse to a RankRequest; raises RequestError or DeadlineError."""
        started_ns = time.perf_counter_ns()
        call.check_deadline()
        tasks = self._tasks(request.tasks)
        if request.explain_top > MAX_EXPLAINED:
            raise RequestError(f"explain_top is {request.explain_top}, at most {MAX_EXPLAINED} candidates are explained")
        _check_propensities(request)
        asked = self._columns(request, call)
        if self._merges and request.num_candidates <= PART_ROWS:
            merged = yield Ask(self.engine, asked.input)
            assert merged is not None
            output = replace(merged, order=merged.order[: request.top_k] if request.top_k else merged.order)
        else:
            output = yield from self.rank_parts(asked.input, request.top_k)
        if tasks and tasks[0]:
            order = np.argsort(-output.scores_NT[:, tasks[0]], kind="stable")
            output = replace(output, order=order[: request.top_k] if request.top_k else order)
        response = self._response(call, output, tasks)
        response.defaults.user_columns.extend(asked.user_missing)
        response.defaults.item_columns.extend(asked.item_missing)
        _set_lookups(response, asked)
        if request.explain_top:
            yield from self._explain(response, asked.input, output, tasks[0] if tasks else 0, request.explain_top)
        times_us = self.times_us(call, started_ns, asked.decoded_ns, asked.cached_ns, output.times)
        if self._log is not None:
            self._write_log(call, request, asked, output, times_us)
        _set_timings(response.timings, times_us)
        self.observe(call, request.num_candidates, (*asked.user_missing, *asked.item_missing), times_us)
        self._observe_lookups(asked)
        answer: bytes = response.SerializeToString()
        return answer

    def score(self, request: pb.ScoreRequest, call: Call) -> Steps:
        """Serialised ScoreResponse to a ScoreRequest; raises RequestError or DeadlineError."""
        started_ns = time.perf_counter_ns()
        call.check_deadline()
        tasks = self._tasks(request.tasks)
        rows, user_missing, item_missing = self._rows(request)
        decoded_ns = time.perf_counter_ns()
        call.check_deadline()
        scores_BT = yield from self.score_rows(rows)
        manifest = self.engine.manifest
        response = pb.ScoreResponse(request_id=call.request_id, model_name=manifest.model_name, model_version=manifest.model_version)
        for task in tasks or range(len(manifest.tasks)):
            response.tasks.add(name=manifest.tasks[task], scores=scores_BT[:, task].tolist())
        response.defaults.user_columns.extend(user_missing)
        response.defaults.item_columns.extend(item_missing)
        computed = StageTimes(0, 0, (time.perf_counter_ns() - decoded_ns) // 1000)
        times_us = self.times_us(call, started_ns, decoded_ns, decoded_ns, computed)
        _set_timings(response.timings, times_us)
        self.observe(call, request.num_rows, (*user_missing, *item_missing), times_us)
        answer: bytes = response.SerializeToString()
        return answer

    def score_rows(self, rows: pa.RecordBatch) -> Generator[None, Any, npt.NDArray[np.float32]]:
        """scores_BT of rows that have all the spec's columns; raises RequestError for bad values."""
        parts = []
        for start in range(0, rows.num_rows, PART_ROWS):
            if start:
                yield
            try:
                parts.append(self.engine.score(rows.slice(start, PART_ROWS)))
            except DataError as error:
                raise RequestError(str(error)) from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rank_parts(self, rank_input: RankInput, top_k: int) -> Generator[None, Any, RankOutput]:
        """What `Engine.rank` gives, part by part of the candidates; raises RequestError for bad values."""
        if rank_input.items.num_rows <= PART_ROWS:
            return self.engine.rank(rank_input, top_k)
        outputs = []
        for start in range(0, rank_input.items.num_rows, PART_ROWS):
            if start:
                yield
            outputs.append(self.engine.rank(RankInput(rank_input.user, rank_input.items.slice(start, PART_ROWS))))
        scores_NT = np.concatenate([output.scores_NT for output in outputs])
        order = np.argsort(-scores_NT[:, 0], kind="stable")
        times = StageTimes(
            sum(output.times.transform_us for output in outputs),
            sum(output.times.lookup_us for output in outputs),
            sum(output.times.compute_us for output in outputs),
        )
        return RankOutput(scores_NT, order[:top_k] if top_k else order, times)

    def _tasks(self, names: Sequence[str]) -> list[int]:
        """Positions of the tasks asked for; empty: none was named."""
        tasks = self.engine.manifest.tasks
        for name in names:
            if name not in tasks:
                raise RequestError(f"unknown task {name[:100]!r}; {nearest(name[:100], tasks)}")
        return [tasks.index(name) for name in dict.fromkeys(names)]

    def _columns(self, request: pb.RankRequest, call: Call) -> _Asked:
        schema, count = self.engine.schema, request.num_candidates
        sent = self._decode("request", request.user, 1)
        ids = decode_column(request.candidate_ids, count) if request.HasField("candidate_ids") else None
        if ids is not None and pa.types.is_list(ids.type):
            raise RequestError("candidate_ids holds lists, one id a candidate is needed")
        if ids is None and not request.item_features and len(schema.item):
            raise RequestError("neither candidate_ids nor item_features are set, one of them is needed")
        given = self._decode("item", request.item_features, count)
        decoded_ns = time.perf_counter_ns()
        call.check_deadline()
        user_columns, of_user = self._complete_user(sent, call)
        user, user_missing = schema.conform("request", user_columns, 1)
        columns, of_items = self._complete(ids, given, call)
        items, item_missing = schema.conform("item", columns, count)
        cached_ns = time.perf_counter_ns()
        call.check_deadline()
        logged_ids = given.get(self._item_key or "") if ids is None else ids
        return _Asked(RankInput(user, items), logged_ids, user_missing, item_missing, of_items, of_user, decoded_ns, cached_ns)

    def _decode(self, side: Side, columns: Iterable[pb.Column], num_rows: int) -> dict[str, pa.Array]:
        decoded: dict[str, pa.Array] = {}
        known = self._item_columns if side == "item" else self._user_columns
        for column in columns:
            name = column.name
            if name not in known:  # before the values, so that a message of a million columns costs no more than one of a few
                self.engine.schema.check_name(side, name)
            if name in decoded:
                raise RequestError(f"feature {name!r} is sent twice")
            decoded[name] = decode_column(column, num_rows)
        return decoded

    def _complete(self, ids: pa.Array | None, given: dict[str, pa.Array], call: Call) -> tuple[dict[str, pa.Array], EntityRows | None]:
        """Item columns of request and cache together, and what the cache said."""
        wanted = self._item_columns
        if ids is None or wanted <= given.keys():
            return given, None
        if self._items is not None:
            rows = self._items.fetch(ids, call.deadline_ns)
            known = {name: array for name, array in rows.columns.items() if name in wanted}
            return {**known, **given}, rows
        if self._item_key is not None and self._item_key not in given:
            return {**given, self._item_key: ids}, None
        return given, None

    def _complete_user(self, sent: dict[str, pa.Array], call: Call) -> tuple[dict[str, pa.Array], EntityRows | None]:
        """Request-level columns of request and cache together, and what the cache said; nothing where all or no id was sent."""
        if self._users is None or self._users.key not in sent or self._user_columns <= sent.keys():
            return sent, None
        rows = self._users.fetch(sent[self._users.key], call.deadline_ns)
        return {**{name: array for name, array in rows.columns.items() if name in self._user_columns}, **sent}, rows

    def _rows(self, request: pb.ScoreRequest) -> tuple[pa.RecordBatch, tuple[str, ...], tuple[str, ...]]:
        """Rows with all the spec's columns, and the request-level and item columns that were left out."""
        schema, count = self.engine.schema, request.num_rows
        sides: dict[Side, list[pb.Column]] = {"request": [], "item": []}
        for column in request.features:
            if column.name in self._user_columns:
                sides["request"].append(column)
                if column.name not in self._item_columns:
                    continue
            elif column.name not in self._item_columns:
                raise RequestError(
                    f"unknown feature {column.name[:100]!r}; {nearest(column.name[:100], [*self._user_columns, *self._item_columns])}"
                )
            sides["item"].append(column)
        user, user_missing = schema.conform("request", self._decode("request", sides["request"], count), count)
        items, item_missing = schema.conform("item", self._decode("item", sides["item"], count), count)
        columns = dict(zip(user.schema.names, user.columns, strict=True)) | dict(zip(items.schema.names, items.columns, strict=True))
        return pa.RecordBatch.from_pydict(columns), user_missing, item_missing

    def _response(self, call: Call, output: RankOutput, tasks: list[int]) -> pb.RankResponse:
        manifest = self.engine.manifest
        response = pb.RankResponse(request_id=call.request_id, model_name=manifest.model_name, model_version=manifest.model_version)
        response.scores.extend(output.scores_NT[:, tasks[0] if tasks else 0].tolist())
        response.order.extend(output.order.tolist())
        if len(manifest.tasks) > 1:
            for task in tasks or range(len(manifest.tasks)):
                response.tasks.add(name=manifest.tasks[task], scores=output.scores_NT[:, task].tolist())
        return response

    def _explain(
        self, response: pb.RankResponse, rank_input: RankInput, output: RankOutput, task: int, top: int
    ) -> Generator[None, Any, None]:
        order = output.order if len(output.order) >= top else np.argsort(-output.scores_NT[:, task], kind="stable")
        chosen_K = order[:top]
        explained = yield from explain(self.engine, rank_input, chosen_K, output.scores_NT[chosen_K, task], task)
        message = response.explanations
        message.features.extend(explained.features)
        message.candidates.extend(chosen_K.tolist())
        message.contributions.extend(explained.contributions_KF.reshape(-1).tolist())
        message.baselines.extend(explained.baseline_K.tolist())

    def _write_log(self, call: Call, request: pb.RankRequest, asked: _Asked, output: RankOutput, times_us: dict[str, int]) -> None:
        assert self._log is not None
        manifest = self.engine.manifest
        self._log.write(
            LoggedRequest(
                request_id=call.request_id,
                time_us=time.time_ns() // 1000,
                model_name=manifest.model_name,
                model_version=manifest.model_version,
                spec_digest=manifest.spec_digest,
                candidate_ids=asked.ids,
                input=asked.input,
                scores_NT=output.scores_NT,
                propensity_N=np.array(request.propensities) if request.propensities else None,
                defaulted=(*asked.user_missing, *asked.item_missing),
                unknown=tuple(asked.unknown),
                times_us=times_us,
            )
        )

    @staticmethod
    def times_us(call: Call, started_ns: int, decoded_ns: int, cached_ns: int, times: StageTimes) -> dict[str, int]:
        """Microseconds by stage of an answered call."""
        return {
            "queue": (started_ns - call.arrived_ns) // 1000,
            "decode": (decoded_ns - started_ns) // 1000,
            "cache": (cached_ns - decoded_ns) // 1000,
            "transform": times.transform_us,
            "lookup": times.lookup_us,
            "compute": times.compute_us,
            "total": (time.perf_counter_ns() - call.arrived_ns) // 1000,
        }

    def observe(self, call: Call, count: int, defaulted: tuple[str, ...], times_us: dict[str, int]) -> None:
        """Tell the telemetry of an answered call."""
        telemetry = self.telemetry
        telemetry.observe_stages(times_us)
        telemetry.candidates.observe(count)
        for column in defaulted:
            telemetry.defaulted_columns.labels(column).inc()

    def _observe_lookups(self, asked: _Asked) -> None:
        telemetry = self.telemetry
        if asked.items is not None:
            for counter, count in (
                (telemetry.unknown_candidates, len(asked.unknown)),
                (telemetry.failed_candidates, _count(asked.items.failed_N)),
                (telemetry.stale_candidates, _count(asked.items.stale_N)),
            ):
                if count:
                    counter.inc(count)
        if asked.user is not None:
            telemetry.users.labels(_outcome(asked.user)).inc()


def _set_lookups(response: pb.RankResponse, asked: _Asked) -> None:
    """Say what the answer lacks and where it is old."""
    defaults = response.defaults
    defaults.unknown_candidates.extend(asked.unknown)
    if asked.items is not None:
        if asked.items.failed_N is not None:
            defaults.failed_candidates.extend(asked.items.failed_N.nonzero()[0].tolist())
        if asked.items.stale_N is not None:
            response.staleness.candidates.extend(asked.items.stale_N.nonzero()[0].tolist())
    if asked.user is not None:
        outcome = _outcome(asked.user)
        defaults.unknown_user, defaults.failed_user = outcome == "unknown", outcome == "failed"
        if outcome == "stale":
            response.staleness.user = True
    oldest_ms = max([rows.oldest_ms for rows in (asked.items, asked.user) if rows is not None], default=0)
    if oldest_ms:
        response.staleness.oldest_ms = min(oldest_ms, 0xFFFFFFFF)


def _outcome(user: EntityRows) -> str:
    """known, unknown, failed or stale."""
    if _count(user.failed_N):
        return "failed"
    return "unknown" if not user.known_N[0] else "stale" if _count(user.stale_N) else "known"


def _count(flags_N: npt.NDArray[np.bool_] | None) -> int:
    return 0 if flags_N is None else int(np.count_nonzero(flags_N))


def _set_timings(timings: pb.Timings, times_us: dict[str, int]) -> None:
    for stage, value in times_us.items():
        setattr(timings, f"{stage}_us", min(max(value, 0), 0xFFFFFFFF))


def _check_propensities(request: pb.RankRequest) -> None:
    if not request.propensities:
        return
    given = np.array(request.propensities)
    if len(given) != request.num_candidates:
        raise RequestError(f"propensities holds {len(given)} numbers, one a candidate is needed: {request.num_candidates}")
    wrong_N = ~((given > 0) & (given <= 1))
    if wrong_N.any():
        index = int(wrong_N.argmax())
        raise RequestError(f"propensities: {given[index]:g} of candidate {index}; a chance above 0 and at most 1 is needed")
