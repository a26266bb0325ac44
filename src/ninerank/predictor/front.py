"""Calls of the wire, from bytes to bytes, through queue and model host; knows nothing of gRPC.

    bytes -> message -> queue (bounded, by priority and deadline) -> lease of a model version -> RankService -> bytes

The main path of serving is `Front.rank`, `Dispatcher.run`, `RankService.rank`.
"""

import asyncio
import contextlib
import re
import time
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from ninerank.errors import NinerankError, OverloadError, RequestError
from ninerank.predictor.admission import Steps
from ninerank.predictor.call import HIGH, LOW, NORMAL, Call
from ninerank.predictor.dispatch import Dispatcher
from ninerank.predictor.host import ModelHost, ModelState, Served
from ninerank.predictor.request import check_num_candidates
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["Front", "message_of", "model_message"]

SHADOW_NS = 5_000_000_000
"""In which a shadow version has to score a request."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_PRIORITIES = {pb.PRIORITY_NORMAL: NORMAL, pb.PRIORITY_HIGH: HIGH, pb.PRIORITY_LOW: LOW}
M = TypeVar("M", bound=Message)


class Front:
    """The methods of `ninerank.v1.Predictor` and `ninerank.v1.Admin`, awaited on the dispatcher's loop.

    Each takes the bytes of a request, which need be no message, and raises a NinerankError where it has no answer; `call.request_id`
    names the request from then on. max_message_bytes: of a request. max_candidates: of a request, or rows to be scored.
    """

    def __init__(self, host: ModelHost, dispatcher: Dispatcher, *, max_message_bytes: int, max_candidates: int) -> None:
        self.host = host
        self.dispatcher = dispatcher
        self._max_message_bytes = max_message_bytes
        self._max_candidates = max_candidates
        self._unheard: set[asyncio.Future[None]] = set()

    async def rank(self, data: bytes, call: Call) -> bytes:
        """RankResponse to a RankRequest."""
        request = self._parse(pb.RankRequest, data, call)
        check_num_candidates(request.num_candidates, self._max_candidates)
        answer = await self.dispatcher.run(call, request.num_candidates, self._rank_steps(request, call))
        if not request.model_version:
            unheard = self.host.shadow(request.model_name, request.session or call.request_id)
            if unheard is not None:
                self._score_unheard(unheard, request, call)
        return answer

    def _score_unheard(self, shadow: Served, request: pb.RankRequest, call: Call) -> None:
        """Have a shadow version score the request too, after all that waits; its answer goes to its log alone."""
        now_ns = time.perf_counter_ns()
        own = Call(now_ns, now_ns + SHADOW_NS, call.request_id, LOW, call.client)

        def steps() -> Steps:
            with shadow as service:
                return (yield from service.rank(request, own))

        async def run() -> None:
            with contextlib.suppress(NinerankError):  # no time or no place: it is dropped
                await self.dispatcher.run(own, request.num_candidates, steps())

        task = asyncio.ensure_future(run())
        self._unheard.add(task)
        task.add_done_callback(self._unheard.discard)

    async def score(self, data: bytes, call: Call) -> bytes:
        """ScoreResponse to a ScoreRequest."""
        request = self._parse(pb.ScoreRequest, data, call)
        self.check_rows(request.num_rows)
        return await self.dispatcher.run(call, request.num_rows, self._score_steps(request, call))

    async def model_status(self, data: bytes, call: Call) -> bytes:
        """ModelStatusResponse to a ModelStatusRequest."""
        request = message_of(pb.ModelStatusRequest, data)
        models = [
            model_message(state)
            for state in self.host.models()
            if request.model_name in {"", state.name} and request.model_version in {"", state.version}
        ]
        answer: bytes = pb.ModelStatusResponse(models=models).SerializeToString()
        return answer

    def check_size(self, data: bytes) -> None:
        """Raise OverloadError for a message that is too large."""
        if len(data) > self._max_message_bytes:
            size = f"the message has {len(data):,} bytes, {self._max_message_bytes:,} are allowed"
            raise OverloadError(
                f"{size}: send fewer candidates or ids alone; `ninerank serve --max-message-mb` raises what the server takes"
            )

    def check_rows(self, count: int) -> None:
        """Raise RequestError for no rows, or too many."""
        if not 1 <= count <= self._max_candidates:
            raise RequestError(f"a request needs 1 to {self._max_candidates} rows, this one has {count}")

    def _rank_steps(self, request: pb.RankRequest, call: Call) -> Steps:
        # The lease begins when the first step is computed and ends with the last, or when the steps are dropped.
        with self.host.lease(request.model_name, request.model_version, request.session or call.request_id) as service:
            return (yield from service.rank(request, call))

    def _score_steps(self, request: pb.ScoreRequest, call: Call) -> Steps:
        with self.host.lease(request.model_name, request.model_version, call.request_id) as service:
            return (yield from service.score(request, call))

    def _parse(self, kind: type[M], data: bytes, call: Call) -> Any:
        """The message, and what it says of its call: id, priority, time."""
        self.check_size(data)
        request: Any = message_of(kind, data)
        if request.request_id:
            if not _REQUEST_ID.fullmatch(request.request_id):
                raise RequestError("request_id must be 1 to 128 printable ASCII characters without spaces")
            call.request_id = request.request_id
        priority = _PRIORITIES.get(request.priority)
        if priority is None:
            raise RequestError(f"priority is {request.priority}; valid: {', '.join(pb.Priority.keys())}")
        call.priority = priority
        call.limit(request.timeout_ms)
        call.check_deadline()
        return request


def message_of(kind: type[M], data: bytes) -> M:
    """The message; raises RequestError for bytes that are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RequestError(f"the message is no {kind.DESCRIPTOR.full_name}") from None


def model_message(state: ModelState) -> pb.ModelVersion:
    """A model version's state as the wire tells it."""
    return pb.ModelVersion(
        name=state.name,
        version=state.version,
        state=state.state,
        spec_digest=state.spec_digest,
        tasks=state.tasks,
        loaded_at_s=state.loaded_at_s,
        leases=state.leases,
        reason=state.reason,
    )
