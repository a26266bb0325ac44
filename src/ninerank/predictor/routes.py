"""What gRPC hands over and takes back: methods from bytes to bytes, statuses, the caller's token, counts.

Bytes and not messages, so that a message that is none is answered as a wrong request.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

import grpc

from ninerank.predictor.call import Call, new_request_id
from ninerank.predictor.security import Guard, UnauthenticatedError
from ninerank.predictor.status import Refusal, refusal
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["Counters", "Method", "Routes"]

REQUEST_ID_KEY = "ninerank-request-id"
RETRY_AFTER_KEY = "grpc-retry-pushback-ms"
"""gRPC's own name for it: a client with a retry policy keeps to it without being told."""
AUTHORIZATION_KEY = "authorization"
STREAM_CALLS = 64
"""Requests of one stream that are under way at once; the next is read when one of them is answered."""
Method: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]


class Counters(Protocol):
    """Who is told of calls."""

    def arrived(self) -> None:
        """A call came in; if `answered` is not told of it, gRPC refused it."""

    def answered(self, status: str) -> None:
        """A call, or a request of a stream, ended with that gRPC status."""


class Routes(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Methods of one service. streams: those that take and give a stream of messages, each of which is a request of its own."""

    def __init__(
        self, service: str, methods: Mapping[str, Method], streams: Mapping[str, Method], counters: Counters, guard: Guard | None
    ) -> None:
        self._counters = counters
        self._guard = guard
        self._handlers: dict[str, Any] = {
            f"/{service}/{name}": grpc.unary_unary_rpc_method_handler(self._unary(method)) for name, method in methods.items()
        } | {f"/{service}/{name}": grpc.stream_stream_rpc_method_handler(self._stream(method)) for name, method in streams.items()}

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Handler of a call; counts those too that gRPC refuses itself, since the message is far too large."""
        handler: grpc.RpcMethodHandler[Any, Any] | None = self._handlers.get(details.method)
        if handler is None:
            return None
        self._counters.arrived()
        if self._guard is not None:
            try:
                self._guard.know(_authorization(details.invocation_metadata))
            except UnauthenticatedError as error:
                return self._stranger(error)
        return handler

    def _stranger(self, error: UnauthenticatedError) -> "grpc.RpcMethodHandler[Any, Any]":
        """Refuses a call before its message is read: who is not known may not have the server hold megabytes."""

        async def answer(requests: AsyncIterator[bytes], context: Any) -> None:
            call = _call(context)
            await _abort(context, self._refused(error, call), call)

        return grpc.stream_stream_rpc_method_handler(answer)

    def _unary(self, method: Method) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def answer(data: bytes, context: Any) -> bytes:
            call = _call(context)
            try:
                self._enter(call, context)
                made = await method(data, call)
            except asyncio.CancelledError:  # the client left
                self._counters.answered("CANCELLED")
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
                await _abort(context, self._refused(error, call), call)
                raise AssertionError("abort raises") from None
            self._counters.answered("OK")
            return made

        return answer

    def _stream(self, method: Method) -> Callable[[AsyncIterator[bytes], Any], Awaitable[None]]:
        async def answer(requests: AsyncIterator[bytes], context: Any) -> None:
            opened = _call(context)
            try:
                self._enter(opened, context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
                await _abort(context, self._refused(error, opened), opened)
            writing = asyncio.Lock()

            async def one(data: bytes) -> None:
                call = Call(time.perf_counter_ns(), opened.deadline_ns, new_request_id(), client=opened.client)
                try:
                    made = _embedded(await method(data, call))
                    self._counters.answered("OK")
                except Exception as error:  # noqa: BLE001 - whatever it is, the stream goes on
                    made = _error(self._refused(error, call), call)
                async with writing:
                    await context.write(made)

            await _each(requests, one)

        return answer

    def _enter(self, call: Call, context: Any) -> None:
        if self._guard is not None:
            names = context.auth_context().get("x509_common_name", [b""])
            call.client = self._guard.enter(_authorization(context.invocation_metadata()), names[0].decode("utf-8", "replace"))

    def _refused(self, error: Exception, call: Call) -> Refusal:
        told = refusal(error, call.request_id)
        self._counters.answered(told.status)
        return told


def _authorization(metadata: Any) -> str | None:
    value = dict(metadata or ()).get(AUTHORIZATION_KEY)
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _call(context: Any) -> Call:
    arrived_ns, left_s = time.perf_counter_ns(), context.time_remaining()
    return Call(arrived_ns, None if left_s is None else arrived_ns + int(left_s * 1e9), new_request_id())


async def _abort(context: Any, told: Refusal, call: Call) -> None:
    trailing = [(REQUEST_ID_KEY, call.request_id)]
    if told.retry_after_ms is not None:
        trailing.append((RETRY_AFTER_KEY, str(told.retry_after_ms)))
    await context.abort(grpc.StatusCode[told.status], told.message, tuple(trailing))


async def _each(requests: AsyncIterator[bytes], one: Callable[[bytes], Awaitable[None]]) -> None:
    """Run `one` for every request, some of them at once; those under way end with the stream."""
    running: set[asyncio.Future[None]] = set()
    try:
        async for data in requests:
            if len(running) >= STREAM_CALLS:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running.add(asyncio.ensure_future(one(data)))
        if running:
            await asyncio.wait(running)
    finally:
        for task in running:
            task.cancel()


def _embedded(answer: bytes) -> bytes:
    """The bytes of RankStreamResponse(response=...) around those of a RankResponse: its tag, its length, itself."""
    head, length = bytearray(b"\x0a"), len(answer)
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + answer


def _error(told: Refusal, call: Call) -> bytes:
    code = grpc.StatusCode[told.status].value[0]
    error = pb.Error(request_id=call.request_id, code=code, message=told.message, retry_after_ms=told.retry_after_ms or 0)
    message: bytes = pb.RankStreamResponse(error=error).SerializeToString()
    return message
