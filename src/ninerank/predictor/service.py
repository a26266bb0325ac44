"""One rank call, from the bytes of the request to the bytes of the answer; knows nothing of gRPC.

    bytes -> RankRequest -> columns -> + cached item features -> RankInput -> engine -> RankResponse -> bytes

Shape legend: N candidates, T tasks.
"""

import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError

from ninerank.errors import DeadlineError, RequestError
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature, Side
from ninerank.predictor.cache import FeatureSource
from ninerank.predictor.engine import Engine
from ninerank.predictor.request import MAX_CANDIDATES, RankInput, RankOutput, check_num_candidates
from ninerank.predictor.requestlog import LoggedRequest, RequestLog
from ninerank.predictor.telemetry import Telemetry
from ninerank.predictor.wire import decode_column
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["Call", "RankService", "UnknownModelError", "default_item_key", "new_request_id"]

ITEM_ID_NAMES = ("item_id", "item")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class UnknownModelError(RequestError):
    """The request names a model or version that is not served; gRPC NOT_FOUND."""


@dataclass
class Call:
    """What is known of one call while it runs. arrived_ns: perf_counter. deadline_ns: perf_counter, None without a deadline."""

    arrived_ns: int
    deadline_ns: int | None = None
    request_id: str = ""

    def check_deadline(self) -> None:
        """Raise DeadlineError if an answer would come too late."""
        if self.deadline_ns is not None:
            late_ns = time.perf_counter_ns() - self.deadline_ns
            if late_ns >= 0:
                raise DeadlineError(f"the deadline passed {late_ns / 1e6:.1f} ms ago, before the request was computed")


def default_item_key(spec: FeatureSpec) -> str | None:
    """Column that candidate ids stand for where nobody says: the item id of which the spec has sequences, else `item_id` or `item`."""
    single = [f for f in spec.features if isinstance(f, IdFeature) and f.side == "item" and not f.multi]
    targets = {f.of for f in spec.features if isinstance(f, SequenceFeature)}
    likely = [f.column for f in single if f.name in targets] + [f.column for name in ITEM_ID_NAMES for f in single if f.column == name]
    return likely[0] if likely else None


class RankService:
    """Answers rank calls with one engine; `rank` may be called from any number of threads at once.

    items: where candidate ids are looked up. item_key: column that candidate ids stand for where there is no `items`.
    """

    def __init__(
        self,
        engine: Engine,
        telemetry: Telemetry,
        *,
        items: FeatureSource | None = None,
        item_key: str | None = None,
        request_log: RequestLog | None = None,
        max_candidates: int = MAX_CANDIDATES,
    ) -> None:
        self.engine = engine
        self.telemetry = telemetry
        self._items = items
        self._item_columns = frozenset(engine.schema.item.names)
        self._item_key = item_key or default_item_key(engine.spec)
        self._log = request_log
        self._max_candidates = max_candidates

    def rank(self, data: bytes, call: Call) -> bytes:
        """Serialised RankResponse to a serialised RankRequest.

        Raises RequestError, UnknownModelError or DeadlineError; `call.request_id` names the request from then on.
        """
        started_ns = time.perf_counter_ns()
        request = self._parse(data, call)
        user, user_missing = self._user(request)
        count = request.num_candidates
        ids, given = self._candidates(request)
        decoded_ns = time.perf_counter_ns()
        call.check_deadline()
        items, item_missing, unknown = self._complete(ids, given, count)
        cached_ns = time.perf_counter_ns()
        call.check_deadline()
        rank_input = RankInput(user, items)
        output = self.engine.rank(rank_input, request.top_k)
        response = self._response(call, output)
        response.defaults.user_columns.extend(user_missing)
        response.defaults.item_columns.extend(item_missing)
        response.defaults.unknown_candidates.extend(unknown)
        times_us = {
            "queue": (started_ns - call.arrived_ns) // 1000,
            "decode": (decoded_ns - started_ns) // 1000,
            "cache": (cached_ns - decoded_ns) // 1000,
            "transform": output.times.transform_us,
            "lookup": output.times.lookup_us,
            "compute": output.times.compute_us,
            "total": (time.perf_counter_ns() - call.arrived_ns) // 1000,
        }
        if self._log is not None:
            logged_ids = given.get(self._item_key or "") if ids is None else ids
            self._write_log(call, request, logged_ids, rank_input, output, (*user_missing, *item_missing), tuple(unknown), times_us)
        for stage, value in times_us.items():
            setattr(response.timings, f"{stage}_us", min(max(value, 0), 0xFFFFFFFF))
        self._observe(count, times_us, (*user_missing, *item_missing), len(unknown))
        answer: bytes = response.SerializeToString()
        return answer

    def _parse(self, data: bytes, call: Call) -> pb.RankRequest:
        try:
            request = pb.RankRequest.FromString(data)
        except DecodeError:
            raise RequestError("the message is no ninerank.v1.RankRequest") from None
        if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
            raise RequestError("request_id must be 1 to 128 printable ASCII characters without spaces")
        call.request_id = request.request_id or call.request_id
        if request.timeout_ms:
            deadline_ns = call.arrived_ns + request.timeout_ms * 1_000_000
            call.deadline_ns = deadline_ns if call.deadline_ns is None else min(deadline_ns, call.deadline_ns)
        call.check_deadline()
        manifest = self.engine.manifest
        if request.model_name not in {"", manifest.model_name}:
            raise UnknownModelError(f"model {request.model_name[:100]!r} is not served here; served: {manifest.model_name}")
        if request.model_version not in {"", manifest.model_version}:
            raise UnknownModelError(f"version {request.model_version[:100]!r} is not served here; served: {manifest.model_version}")
        check_num_candidates(request.num_candidates, self._max_candidates)
        self._check_propensities(request)
        return request

    def _check_propensities(self, request: pb.RankRequest) -> None:
        given = np.array(request.propensities)
        if len(given) not in {0, request.num_candidates}:
            raise RequestError(f"propensities holds {len(given)} numbers, one a candidate is needed: {request.num_candidates}")
        wrong_N = ~((given > 0) & (given <= 1))
        if wrong_N.any():
            index = int(wrong_N.argmax())
            raise RequestError(f"propensities: {given[index]:g} of candidate {index}; a chance above 0 and at most 1 is needed")

    def _user(self, request: pb.RankRequest) -> tuple[pa.RecordBatch, tuple[str, ...]]:
        return self.engine.schema.conform("request", self._decode("request", request.user, 1), 1)

    def _candidates(self, request: pb.RankRequest) -> tuple[pa.Array | None, dict[str, pa.Array]]:
        ids = decode_column(request.candidate_ids, request.num_candidates) if request.HasField("candidate_ids") else None
        if ids is not None and pa.types.is_list(ids.type):
            raise RequestError("candidate_ids holds lists, one id a candidate is needed")
        if ids is None and not request.item_features and len(self.engine.schema.item):
            raise RequestError("neither candidate_ids nor item_features are set, one of them is needed")
        return ids, self._decode("item", request.item_features, request.num_candidates)

    def _decode(self, side: Side, columns: Iterable[pb.Column], num_rows: int) -> dict[str, pa.Array]:
        decoded: dict[str, pa.Array] = {}
        for column in columns:
            # Before the values, so that a message of a million columns costs no more than one of a few.
            self.engine.schema.check_name(side, column.name)
            if column.name in decoded:
                raise RequestError(f"feature {column.name!r} is sent twice")
            decoded[column.name] = decode_column(column, num_rows)
        return decoded

    def _complete(self, ids: pa.Array | None, given: dict[str, pa.Array], count: int) -> tuple[pa.RecordBatch, tuple[str, ...], list[int]]:
        """Item columns of request and cache together, those in neither, and the candidates that the cache does not know."""
        columns, unknown = given, []
        wanted = self._item_columns
        if ids is not None and not wanted <= given.keys():
            if self._items is not None:
                rows = self._items.fetch(ids)
                columns = {**{name: array for name, array in rows.columns.items() if name in wanted}, **given}
                unknown = (~rows.known_N).nonzero()[0].tolist()
            elif self._item_key is not None and self._item_key not in given:
                columns = {**given, self._item_key: ids}
        return *self.engine.schema.conform("item", columns, count), unknown

    def _response(self, call: Call, output: RankOutput) -> pb.RankResponse:
        manifest = self.engine.manifest
        response = pb.RankResponse(request_id=call.request_id, model_name=manifest.model_name, model_version=manifest.model_version)
        response.scores.extend(output.scores_NT[:, 0].tolist())
        response.order.extend(output.order.tolist())
        if len(manifest.tasks) > 1:
            for task, name in enumerate(manifest.tasks):
                response.tasks.add(name=name, scores=output.scores_NT[:, task].tolist())
        return response

    def _write_log(
        self,
        call: Call,
        request: pb.RankRequest,
        ids: pa.Array | None,
        rank_input: RankInput,
        output: RankOutput,
        defaulted: tuple[str, ...],
        unknown: tuple[int, ...],
        times_us: dict[str, int],
    ) -> None:
        assert self._log is not None
        manifest = self.engine.manifest
        self._log.write(
            LoggedRequest(
                request_id=call.request_id,
                time_us=time.time_ns() // 1000,
                model_name=manifest.model_name,
                model_version=manifest.model_version,
                spec_digest=manifest.spec_digest,
                candidate_ids=ids,
                input=rank_input,
                scores_NT=output.scores_NT,
                propensity_N=np.array(request.propensities) if request.propensities else None,
                defaulted=defaulted,
                unknown=unknown,
                times_us=times_us,
            )
        )

    def _observe(self, count: int, times_us: dict[str, int], defaulted: tuple[str, ...], unknown: int) -> None:
        telemetry = self.telemetry
        telemetry.observe_stages(times_us)
        telemetry.candidates.observe(count)
        for column in defaulted:
            telemetry.defaulted_columns.labels(column).inc()
        if unknown:
            telemetry.unknown_candidates.inc(unknown)


def new_request_id() -> str:
    """A request id for a client that sent none."""
    return secrets.token_hex(8)
