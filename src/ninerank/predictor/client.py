"""Client of a Ninerank server: plain Python values, lists or arrays in, scores and order out."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import grpc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Self

from ninerank.errors import DeadlineError, NinerankError, OverloadError, RequestError, nearest
from ninerank.predictor.tls import channel_credentials
from ninerank.predictor.wire import encode_column
from ninerank.proto.v1 import predictor_pb2 as pb
from ninerank.proto.v1.predictor_pb2_grpc import PredictorStub

__all__ = [
    "ClientSecurity",
    "Defaults",
    "PredictorClient",
    "RankResult",
    "Staleness",
    "build_request",
    "build_score_request",
    "failure",
    "open_channel",
    "priority_of",
    "result_of",
    "token_metadata",
]

DEFAULT_TIMEOUT_MS = 5_000
MAX_MESSAGE_BYTES = 64 << 20
# Asking again is safe, a rank call changes nothing: a server process that went away is no reason to fail.
_RETRIES = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "ninerank.v1.Predictor"}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.02s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
# What gRPC says of a message beyond a limit: whose limit it is stands before, though not in every version.
_TOO_LARGE = re.compile(
    r"(?P<side>CLIENT: |SERVER: )?(?P<way>Sent|Received) message larger than max \((?P<size>\d+) vs\.? (?P<limit>\d+)\)"
)
_ERRORS: dict[grpc.StatusCode, type[NinerankError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.NOT_FOUND: RequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
}
_PRIORITIES = {"normal": pb.PRIORITY_NORMAL, "high": pb.PRIORITY_HIGH, "low": pb.PRIORITY_LOW}
Priority: TypeAlias = Literal["normal", "high", "low"]
Column: TypeAlias = Sequence[Any] | npt.NDArray[Any] | pa.Array
Items: TypeAlias = Mapping[str, Column] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Defaults:
    """Where the scores rest on defaults: columns sent by nobody, candidates (by index) whose id the server's cache does not know.

    failed_candidates: those whose features may be there but could not be read. unknown_user, failed_user: the same of the user.
    """

    user_columns: tuple[str, ...]
    item_columns: tuple[str, ...]
    unknown_candidates: tuple[int, ...]
    failed_candidates: tuple[int, ...] = ()
    unknown_user: bool = False
    failed_user: bool = False

    def __bool__(self) -> bool:
        candidates = self.unknown_candidates or self.failed_candidates
        return bool(self.user_columns or self.item_columns or candidates or self.unknown_user or self.failed_user)


@dataclass(frozen=True)
class Staleness:
    """Where features past their time stand in for what the store failed to give: candidates by index, the user, age of the oldest."""

    candidates: tuple[int, ...] = ()
    user: bool = False
    oldest_ms: int = 0

    def __bool__(self) -> bool:
        return bool(self.candidates or self.user)


@dataclass(frozen=True)
class RankResult:
    """scores: float32 (N,), one a candidate in the order sent. order: indices, best first, at most top_k.

    tasks: scores by task, of models with several. timings_us: by stage, on the server. explanations: of the best candidates, by index,
    what each feature does to the score, if it was asked for.
    """

    scores: npt.NDArray[np.float32]
    order: npt.NDArray[np.int64]
    request_id: str
    model_name: str
    model_version: str
    tasks: Mapping[str, npt.NDArray[np.float32]]
    timings_us: Mapping[str, int]
    defaults_used: Defaults
    staleness: Staleness = Staleness()
    explanations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientSecurity:
    """How a client shows who it is. tls: encrypt, and have the server show a certificate that `ca` (None: this machine's own) signed.

    certificate, key: PEM files of the client's own certificate. token: of the server's token file.
    """

    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = field(default=None, repr=False)


def open_channel(target: str, options: Sequence[tuple[str, Any]], security: ClientSecurity | None) -> grpc.Channel:
    """A channel in the clear, or over TLS."""
    if security is None or not security.tls:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, channel_credentials(security.ca, security.certificate, security.key), options=options)


def token_metadata(security: ClientSecurity | None) -> tuple[tuple[str, str], ...]:
    """What a call carries so that it is let in."""
    return () if security is None or security.token is None else (("authorization", f"Bearer {security.token}"),)


class PredictorClient:
    """Channels to one server, for any number of threads; close it, or use it as a context manager.

    connections: calls take turns between them; a server of several processes shares connections out, not calls, so that a client alone
    needs a few of them per process to keep all busy. max_message_bytes: of a request and of an answer; the server has a limit of its own.

    with PredictorClient("localhost:50051") as client:
        result = client.rank(user={"user_id": "u7"}, items={"item_id": ["a", "b"], "price": [1.5, 2.0]})
        best = result.order[0]
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        connections: int = 1,
        security: ClientSecurity | None = None,
    ) -> None:
        self.target = target
        self._timeout_ms = timeout_ms
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.service_config", _RETRIES),
            ("grpc.use_local_subchannel_pool", 1),  # channels to one address would share a connection
        ]
        self._channels = [open_channel(target, options, security) for _ in range(max(connections, 1))]
        self._metadata = token_metadata(security)
        self._stubs = itertools.cycle([PredictorStub(channel) for channel in self._channels])  # type: ignore[no-untyped-call]

    def rank(
        self,
        user: Mapping[str, Any],
        items: Items | None = None,
        *,
        ids: Column | None = None,
        top_k: int | None = None,
        timeout_ms: int | None = None,
        request_id: str = "",
        model_name: str = "",
        model_version: str = "",
        propensities: Sequence[float] | npt.NDArray[np.float64] | None = None,
        tasks: Sequence[str] = (),
        explain_top: int = 0,
        priority: Priority = "normal",
        session: str = "",
    ) -> RankResult:
        """Score and order candidates for one user.

        user: one value a column (a list for features with many values). items: columns of N values, or N mappings. ids: N candidate
        ids, to be looked up by the server. At least one of items and ids is needed. timeout_ms: instead of the client's.
        propensities: chance with which each candidate is shown, for the request log alone. tasks: those wanted, the first of which
        orders. explain_top: explain so many of the best candidates. priority: who goes first where requests wait. session: what
        traffic is split between versions by.

        Raises RequestError for what the server refuses, DeadlineError when time ran out, OverloadError where the server takes no
        more, NinerankError where it cannot be reached or failed.
        """
        request = build_request(user, items, ids=ids, top_k=top_k)
        request.request_id, request.model_name, request.model_version = request_id, model_name, model_version
        if propensities is not None:
            request.propensities.extend(propensities)
        request.tasks.extend(tasks)
        request.explain_top, request.session = explain_top, session
        request.priority = priority_of(priority)
        response: pb.RankResponse = self._call("Rank", request, timeout_ms)
        return result_of(response)

    def score(
        self,
        rows: Items | pa.RecordBatch,
        *,
        timeout_ms: int | None = None,
        request_id: str = "",
        model_name: str = "",
        model_version: str = "",
        tasks: Sequence[str] = (),
        priority: Priority = "normal",
    ) -> Mapping[str, npt.NDArray[np.float32]]:
        """Scores by task of rows that hold user and item features side by side; errors as of `rank`."""
        request = build_score_request(rows)
        request.request_id, request.model_name, request.model_version = request_id, model_name, model_version
        request.tasks.extend(tasks)
        request.priority = priority_of(priority)
        response: pb.ScoreResponse = self._call("Score", request, timeout_ms)
        return {task.name: np.array(task.scores, np.float32) for task in response.tasks}

    def models(self) -> list[pb.ModelVersion]:
        """Versions that are loading, ready, draining or were refused."""
        response: pb.ModelStatusResponse = self._call("ModelStatus", pb.ModelStatusRequest(), None)
        return list(response.models)

    def _call(self, method: str, request: Any, timeout_ms: int | None) -> Any:
        timeout_s = (timeout_ms or self._timeout_ms) / 1000
        try:
            return getattr(next(self._stubs), method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise failure(error, self.target, timeout_s) from None

    def close(self) -> None:
        """Close the channels; calls under way fail."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def priority_of(name: str) -> pb.Priority:
    """The wire's number of a priority; raises RequestError for an unknown one."""
    found = _PRIORITIES.get(name)
    if found is None:
        raise RequestError(f"priority {name!r}; {nearest(name, _PRIORITIES)}")
    return found


def build_request(
    user: Mapping[str, Any],
    items: Items | None = None,
    *,
    ids: Column | None = None,
    top_k: int | None = None,
) -> pb.RankRequest:
    """Message of a rank call; raises RequestError for values that cannot be sent.

    >>> build_request({"age": 30}, [{"price": 1.5}, {"price": None}]).num_candidates
    2
    """
    columns = _columns(items)
    lengths = {name: len(array) for name, array in columns.items()}
    id_array = None if ids is None else _array("ids", ids)
    if id_array is not None:
        lengths["ids"] = len(id_array)
    if not lengths:
        if items is None:
            raise RequestError("neither ids nor items are given, one of them is needed")
        what = "the candidates of items have no features" if len(items) else "items is empty"
        raise RequestError(f"{what}, and no ids are given: at least one candidate is needed, with its features or its id")
    if len(set(lengths.values())) > 1:
        raise RequestError(f"candidates are ragged: {', '.join(f'{name} has {count}' for name, count in lengths.items())}")
    if top_k is not None and top_k < 0:
        raise RequestError(f"top_k is {top_k}; 0 (all) or more is needed")
    request = pb.RankRequest(num_candidates=next(iter(lengths.values())), top_k=top_k or 0)
    request.user.extend(encode_column(name, _array(name, [value])) for name, value in user.items() if value is not None)
    if id_array is not None:
        request.candidate_ids.CopyFrom(encode_column("", id_array))
    request.item_features.extend(encode_column(name, array) for name, array in columns.items())
    return request


def build_score_request(rows: Items | pa.RecordBatch) -> pb.ScoreRequest:
    """Message of a score call; raises RequestError for values that cannot be sent."""
    given = dict(zip(rows.schema.names, rows.columns, strict=True)) if isinstance(rows, pa.RecordBatch) else rows
    columns = _columns(given)
    lengths = {len(array) for array in columns.values()}
    if len(lengths) != 1:
        raise RequestError(f"rows need columns of one length, these have {', '.join(map(str, sorted(lengths))) or 'none'}")
    request = pb.ScoreRequest(num_rows=lengths.pop())
    request.features.extend(encode_column(name, array) for name, array in columns.items())
    return request


def _columns(items: Any) -> dict[str, pa.Array]:
    if items is None:
        return {}
    if isinstance(items, Mapping):
        return {name: _array(name, values) for name, values in items.items()}
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise RequestError(f"items is {type(items).__name__}; columns of values, or a list with one mapping a candidate, are needed")
    for row, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise RequestError(f"items[{row}] is {type(item).__name__}, a mapping of feature to value is needed")
    names = dict.fromkeys(name for item in items for name in item)
    return {name: _array(name, [item.get(name) for item in items]) for name in names}


def _array(name: str, values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(f"feature {name!r}: {values!r} is no column, a list with one value a candidate is needed")
    try:
        return values if isinstance(values, pa.Array) else pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise RequestError(f"feature {name!r}: its values cannot be sent ({error})") from None


def result_of(response: pb.RankResponse) -> RankResult:
    """The result that an answer holds."""
    timings, defaults, staleness = response.timings, response.defaults, response.staleness
    return RankResult(
        scores=np.array(response.scores, np.float32),
        order=np.array(response.order, np.int64),
        request_id=response.request_id,
        model_name=response.model_name,
        model_version=response.model_version,
        tasks={task.name: np.array(task.scores, np.float32) for task in response.tasks},
        timings_us={field.name.removesuffix("_us"): getattr(timings, field.name) for field in timings.DESCRIPTOR.fields},
        defaults_used=Defaults(
            tuple(defaults.user_columns),
            tuple(defaults.item_columns),
            tuple(defaults.unknown_candidates),
            tuple(defaults.failed_candidates),
            defaults.unknown_user,
            defaults.failed_user,
        ),
        staleness=Staleness(tuple(staleness.candidates), staleness.user, staleness.oldest_ms),
        explanations=_explanations(response.explanations),
    )


def _explanations(message: pb.Explanations) -> dict[int, dict[str, float]]:
    rows = np.array(message.contributions, np.float32).reshape(len(message.candidates), len(message.features))
    return {index: dict(zip(message.features, row.tolist(), strict=True)) for index, row in zip(message.candidates, rows, strict=True)}


def failure(error: grpc.RpcError, target: str, timeout_s: float) -> NinerankError:
    """The error that a failed call is to whoever made it."""
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"no answer from {target} within {timeout_s * 1000:g} ms ({details}); give a longer timeout_ms")
    if status in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
        return NinerankError(f"{target} does not let this client in: {details}")
    if status is grpc.StatusCode.UNAVAILABLE:
        return NinerankError(f"no server answers at {target} ({details})")
    found = _TOO_LARGE.search(details)
    if found is not None:
        return OverloadError(_too_large(found))
    kind = _ERRORS.get(status, NinerankError)
    if kind is OverloadError:
        trailing: Any = error.trailing_metadata() or ()
        found_ms = [int(value) for key, value in trailing if key == "grpc-retry-pushback-ms"]
        return OverloadError(details, found_ms[0] if found_ms else None)
    return kind(details or status.name)


def _too_large(found: "re.Match[str]") -> str:
    size, limit = int(found["size"]), int(found["limit"])
    is_own = found["side"] == "CLIENT: " or (found["side"] is None and found["way"] == "Sent")
    raise_it = "`ninerank serve --max-message-mb` raises what the server takes"
    if is_own:
        raise_it = f"PredictorClient(max_message_bytes=...) raises what this client {'sends' if found['way'] == 'Sent' else 'takes'}"
    return f"the message has {size:,} bytes, {limit:,} are allowed: send fewer candidates or ids alone; {raise_it}"
