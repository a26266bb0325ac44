"""The gRPC server around a `RankService`: statuses, limits, health, reflection, metrics and a graceful end."""

import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError, DeadlineError, DeviceError, NinerankError, OverloadError, RequestError, nearest
from ninerank.predictor.cache import FeatureCache, load_items
from ninerank.predictor.engine import Engine
from ninerank.predictor.request import MAX_CANDIDATES
from ninerank.predictor.requestlog import LogConfig, RequestLog
from ninerank.predictor.service import Call, RankService, UnknownModelError, default_item_key, new_request_id
from ninerank.predictor.telemetry import Telemetry
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["PredictorServer", "ServeConfig", "serve"]

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Predictor"].full_name
REQUEST_ID_KEY = "ninerank-request-id"
HEADROOM = 2
MAX_GRPC_BYTES = (1 << 31) - 1
MAX_MESSAGE_LENGTH = 1_000  # of an error: it travels in a header, and peers bound these
# The first class that fits decides.
_STATUS: tuple[tuple[type[NinerankError], grpc.StatusCode], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED),
)


class ServeConfig(Config):
    """How a server listens and what it bounds. A port of 0 takes a free one.

    workers: requests computed at once, each by one thread. max_pending: requests taken in at once, those being computed among them;
    the next one is answered RESOURCE_EXHAUSTED. drain_s: how long the end waits for requests under way.
    item_key: column that candidate ids stand for, in the items file too (default: the item id of which the spec has sequences, else
    `item_id` or `item`).
    """

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    device: str = "auto"
    backend: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(default=2, ge=1, le=256)
    max_pending: int = Field(default=256, ge=1)
    max_message_bytes: int = Field(default=16 << 20, ge=1024, le=MAX_GRPC_BYTES)
    max_candidates: int = Field(default=MAX_CANDIDATES, ge=1)
    items: Path | None = None
    item_key: str | None = None
    cache_bytes: int = Field(default=1 << 30, ge=1)
    log_dir: Path | None = None
    log: LogConfig = LogConfig()
    drain_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)


@dataclass(frozen=True)
class Ports:
    """Where the server listens. metrics: None where there is no /metrics."""

    grpc: int
    metrics: int | None


class PredictorServer:
    """A bundle being served. `start` makes it answer, `stop` lets what is under way finish."""

    def __init__(self, bundle_dir: str | Path, config: ServeConfig) -> None:
        # One thread an operator, however many workers: more of them trample each other's caches and wait for each other.
        torch.set_num_threads(1)
        self.config = config
        self.engine = Engine.load(bundle_dir, config.device, backend=config.backend, precision=config.precision)
        self.cache = _items(self.engine, config)
        self.log = None
        if config.log_dir is not None:
            self.log = RequestLog(config.log_dir, self.engine.schema, len(self.engine.manifest.tasks), config.log)
        self.telemetry = Telemetry(self.engine.manifest, self.cache, self.log)
        self.service = RankService(
            self.engine,
            self.telemetry,
            items=self.cache,
            item_key=config.item_key,
            request_log=self.log,
            max_candidates=config.max_candidates,
        )
        self._pool = _TimedPool(config.workers, thread_name_prefix="rank")
        self._health = health.HealthServicer()
        self._server = grpc.server(
            self._pool,
            maximum_concurrent_rpcs=config.max_pending,
            interceptors=[_Arrivals(self.telemetry)],
            options=[
                # Up to here a request is refused by `_rank`, which counts it; gRPC refuses what is larger still before anybody hears of it.
                ("grpc.max_receive_message_length", min(HEADROOM * config.max_message_bytes, MAX_GRPC_BYTES)),
                ("grpc.max_send_message_length", config.max_message_bytes),
                ("grpc.so_reuseport", 0),
            ],
        )
        handler = grpc.unary_unary_rpc_method_handler(self._rank)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Rank": handler}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def start(self) -> Ports:
        """Listen and answer; raises DeviceError where a port cannot be had."""
        metrics = None
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host  # IPv6
        address = f"{host}:{self.config.port}"
        wanted = f"metrics port {self.config.metrics_port} of {host}"
        try:
            if self.config.metrics_port is not None:
                metrics = self.telemetry.listen(self.config.host, self.config.metrics_port)
            wanted = address
            port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            self.stop(0)
            raise DeviceError(f"cannot listen on {wanted}: it is in use or no address of this machine; port 0 takes a free one") from error
        self._server.start()
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return Ports(port, metrics)

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse new requests, give those under way `grace_s` (default: drain_s) seconds, write the log."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.stop(self.config.drain_s if grace_s is None else grace_s).wait()
        self._pool.shutdown()
        if self.log is not None:
            self.log.close()
        self.telemetry.close()

    def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            self._health.set(name, status)

    def _rank(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """gRPC hands over bytes, not a message, so that a message that is none is answered as a wrong request."""
        # Without a deadline gRPC says that years remain.
        deadline_ns = time.perf_counter_ns() + int(min(context.time_remaining(), 1e9) * 1e9)
        call = Call(self._pool.submitted_ns(), deadline_ns, new_request_id())
        if not context.is_active():  # the client left while the call waited for a worker
            self.telemetry.requests.labels(grpc.StatusCode.CANCELLED.name).inc()
            context.abort(grpc.StatusCode.CANCELLED, "the call was cancelled")
        try:
            if len(data) > self.config.max_message_bytes:
                size = f"the message has {len(data):,} bytes, {self.config.max_message_bytes:,} are allowed"
                raise OverloadError(
                    f"{size}: send fewer candidates or ids alone; `ninerank serve --max-message-mb` raises what the server takes"
                )
            answer = self.service.rank(data, call)
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
            status, message = _refusal(error, call.request_id)
        else:
            self.telemetry.requests.labels(grpc.StatusCode.OK.name).inc()
            return answer
        self.telemetry.requests.labels(status.name).inc()
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        context.abort(status, message)
        raise AssertionError("abort raises")


def _refusal(error: Exception, request_id: str) -> tuple[grpc.StatusCode, str]:
    """Status and message for the client; of a fault of our own it learns the request id alone, the log has the rest."""
    for kind, status in _STATUS:
        if isinstance(error, kind):
            text = str(error)
            shown = text if len(text) <= MAX_MESSAGE_LENGTH else text[:MAX_MESSAGE_LENGTH] + "..."
            return status, f"{shown} (request {request_id})"
    log.error("request %s failed", request_id, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error (request {request_id})"


class _Arrivals(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Counts rank calls as they arrive: those too that gRPC refuses itself, since too many wait or the message is far too large."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        if details.method == f"/{SERVICE}/Rank":
            self._telemetry.calls.inc()
        return continuation(details)


class _TimedPool(ThreadPoolExecutor):
    """Threads that know when the call they run was handed in, so that the wait for a thread can be told."""

    _own = threading.local()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        return super().submit(self._run, time.perf_counter_ns(), function, args, kwargs)

    def _run(self, submitted_ns: int, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._own.submitted_ns = submitted_ns
        return function(*args, **kwargs)

    def submitted_ns(self) -> int:
        """perf_counter at which the calling thread's call was handed in."""
        submitted: int = self._own.submitted_ns
        return submitted


def _items(engine: Engine, config: ServeConfig) -> FeatureCache | None:
    """The feature cache that the configuration asks for; raises DataError where its key cannot be told or is no column."""
    columns = engine.schema.item.names
    if config.items is None:
        if config.item_key is not None and config.item_key not in columns:
            raise DataError(f"item key {config.item_key!r} is no item column; {nearest(config.item_key, columns)}")
        return None
    key = config.item_key or default_item_key(engine.spec)
    if key is None:
        raise DataError(f"{config.items}: which column holds the ids? name it (--item-key), one of the file's columns")
    return load_items(config.items, engine.schema.item, key=key, capacity_bytes=config.cache_bytes)


def serve(bundle_dir: str | Path, config: ServeConfig, ready: Callable[[PredictorServer, Ports], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `ready` is called once the server answers. Call it from the main thread."""
    server = PredictorServer(bundle_dir, config)
    done = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def finish(number: int, frame: FrameType | None) -> None:
        log.info("signal %d: draining for at most %g s", number, config.drain_s)
        restore()  # a second signal ends the process the hard way
        done.set()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, finish)
    try:
        ports = server.start()
        if ready is not None:
            ready(server, ports)
        while not done.wait(1.0):  # a wait without end would keep Python from running the signal handler on some platforms
            pass
    finally:
        restore()
        server.stop()
