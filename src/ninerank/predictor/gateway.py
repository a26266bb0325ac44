"""The JSON gateway: HTTP for people, curl and what speaks no gRPC. Programs that count microseconds speak gRPC.

    POST /v1/rank    a request file's JSON (see `requestfile`)     -> what `ninerank rank --json` prints
    POST /v1/score   {"rows": [{...}, ...] or {column: [...]}}    -> {"scores": {task: [...]}, ...}
    GET  /v1/models  versions that are served
    GET  /healthz    the process answers        GET /readyz   it takes calls

Calls go the way of those over gRPC: the same queue, limits, tokens and counts. An error is {"error": {"status", "message", "request_id"}}.
"""

import asyncio
import contextlib
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ninerank.errors import DeviceError, OverloadError, RequestError, SpecError
from ninerank.predictor.call import Call, new_request_id
from ninerank.predictor.client import result_of
from ninerank.predictor.front import Front
from ninerank.predictor.requestfile import RequestFile, ScoreFile, answer
from ninerank.predictor.routes import Counters
from ninerank.predictor.security import Guard, SecurityConfig
from ninerank.predictor.status import refusal
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["Gateway"]

CERTIFICATE_CHECK_S = 1.0
HTTP = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "DEADLINE_EXCEEDED": 504,
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """Made and used on the event loop. max_message_bytes: of a request."""

    def __init__(self, front: Front, counters: Counters, *, max_message_bytes: int, guard: Guard | None, security: SecurityConfig) -> None:
        self._front, self._counters, self._guard = front, counters, guard
        self._security = security
        self._is_open = False
        self._follower: asyncio.Task[None] | None = None
        app = web.Application(client_max_size=max_message_bytes)
        app.add_routes(
            [
                web.post("/v1/rank", self._guarded(self._rank)),
                web.post("/v1/score", self._guarded(self._score)),
                web.get("/v1/models", self._guarded(self._models)),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Answer at `host`:`port` (0: a free one); the port is returned. Raises DeviceError where it cannot be had."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=self._tls(), reuse_port=reuse_port or None)
        try:
            await site.start()
        except OSError as error:
            raise DeviceError(f"cannot listen on HTTP port {port} of {host}: it is in use or no address of this machine") from error
        self._is_open = True
        taken: int = self._runner.addresses[0][1]
        return taken

    async def close(self, grace_s: float) -> None:
        """Tell probes that no more calls are wanted, finish those under way."""
        self._is_open = False
        if self._follower is not None:
            self._follower.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._runner.cleanup(), max(grace_s, 0.1))

    def _guarded(self, method: Callable[[web.Request, Call], Awaitable[web.Response]]) -> Handler:
        """A handler that lets callers in, and tells and counts what became of them."""

        async def handle(request: web.Request) -> web.StreamResponse:
            call = Call(time.perf_counter_ns(), None, new_request_id())
            self._counters.arrived()
            try:
                if self._guard is not None:
                    call.client = self._guard.enter(request.headers.get("Authorization"), _certificate_name(request))
                made = await method(request, call)
            except web.HTTPRequestEntityTooLarge:
                return self._refused(OverloadError(f"the body has more than the {request.client_max_size:,} bytes that are allowed"), call)
            except SpecError as error:  # keys that no request has
                return self._refused(RequestError(str(error)), call)
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
                return self._refused(error, call)
            self._counters.answered("OK")
            return made

        return handle

    def _refused(self, error: Exception, call: Call) -> web.Response:
        told = refusal(error, call.request_id)
        self._counters.answered(told.status)
        headers = {}
        if told.retry_after_ms is not None:
            headers["Retry-After"] = str(math.ceil(told.retry_after_ms / 1000))
        if told.status == "UNAUTHENTICATED":
            headers["WWW-Authenticate"] = "Bearer"
        what = {"status": told.status, "message": told.message, "request_id": call.request_id, "retry_after_ms": told.retry_after_ms}
        error_body = {"error": {key: value for key, value in what.items() if value is not None}}
        return web.json_response(error_body, status=HTTP[told.status], headers=headers)

    async def _rank(self, request: web.Request, call: Call) -> web.Response:
        asked = RequestFile.from_text(await _text(request), "the body")
        response = pb.RankResponse.FromString(await self._front.rank(asked.message().SerializeToString(), call))
        return web.json_response(answer(result_of(response), asked.ids))

    async def _score(self, request: web.Request, call: Call) -> web.Response:
        asked = ScoreFile.from_text(await _text(request), "the body")
        response = pb.ScoreResponse.FromString(await self._front.score(asked.message().SerializeToString(), call))
        return web.json_response(
            {
                "request_id": response.request_id,
                "model_name": response.model_name,
                "model_version": response.model_version,
                "scores": {task.name: list(task.scores) for task in response.tasks},
            }
        )

    async def _models(self, request: web.Request, call: Call) -> web.Response:
        return web.json_response({"models": [vars(state) for state in self._front.host.models()]})

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        is_ready = self._is_open and any(state.state == "READY" for state in self._front.host.models())
        return web.Response(text="ready\n" if is_ready else "not ready\n", status=200 if is_ready else 503)

    def _tls(self) -> ssl.SSLContext | None:
        certificate, key, client_ca = self._security.certificate, self._security.key, self._security.client_ca
        if certificate is None or key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        self._follower = asyncio.create_task(_follow(context, self._security))
        return context


async def _follow(context: ssl.SSLContext, security: SecurityConfig) -> None:
    """Take over a certificate that was replaced; half a change, or a broken file, waits for the next look."""
    assert security.certificate is not None
    assert security.key is not None
    held = None
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_S)
        with contextlib.suppress(OSError, ssl.SSLError):
            now = (security.certificate.stat().st_mtime_ns, security.key.stat().st_mtime_ns)
            if now != held:
                context.load_cert_chain(security.certificate, security.key)
                held = now


async def _text(request: web.Request) -> str:
    try:
        return (await request.read()).decode()
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8 text") from None


def _certificate_name(request: web.Request) -> str:
    transport = request.transport
    facts: Any = None if transport is None else transport.get_extra_info("peercert")
    names = [value for parts in (facts or {}).get("subject", ()) for key, value in parts if key == "commonName"]
    return names[0] if names else ""
