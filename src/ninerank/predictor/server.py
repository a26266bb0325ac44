"""The gRPC server around the `Front`: routes, statuses, limits, health, reflection, metrics and a graceful end."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ninerank.errors import DataError, DeviceError, nearest
from ninerank.predictor.admission import AdmissionQueue
from ninerank.predictor.announcement import Announcement
from ninerank.predictor.cache import FeatureCache, load_items
from ninerank.predictor.call import Call, new_request_id
from ninerank.predictor.dispatch import Dispatcher
from ninerank.predictor.engine import Engine
from ninerank.predictor.eventloop import event_loop, on_loop
from ninerank.predictor.front import Front
from ninerank.predictor.host import SingleModel
from ninerank.predictor.requestlog import RequestLog
from ninerank.predictor.serveconfig import MAX_GRPC_BYTES, ServeConfig
from ninerank.predictor.service import RankService, default_item_key
from ninerank.predictor.status import refusal
from ninerank.predictor.telemetry import Telemetry
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["PredictorServer"]

SERVICE = pb.DESCRIPTOR.services_by_name["Predictor"].full_name
REQUEST_ID_KEY = "ninerank-request-id"
RETRY_AFTER_KEY = "grpc-retry-pushback-ms"
"""gRPC's own name for it: a client with a retry policy keeps to it without being told."""
HEADROOM = 2
OPTIONS = (
    # A client that died without a word is noticed within a minute; one that pings more often than every 5 s is told to stop.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Compressed messages are refused: they cost more time than they save within a data centre, and a few bytes may become gigabytes.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)
Method: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]


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
        )
        self.host = SingleModel(self.service)
        self.queue = AdmissionQueue(config.max_pending, max(config.workers, 1))
        self.front = Front(
            self.host,
            Dispatcher(self.queue, config.workers, event_loop()),
            max_message_bytes=config.max_message_bytes,
            max_candidates=config.max_candidates,
        )
        on_loop(self._build())

    def start(self) -> Announcement:
        """Listen and answer; raises DeviceError where a port cannot be had."""
        metrics = None
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host  # IPv6
        address = f"{host}:{self.config.port}"
        wanted = f"metrics port {self.config.metrics_port} of {host}"
        try:
            if self.config.metrics_port is not None:
                metrics = self.telemetry.listen(self.config.host, self.config.metrics_port)
            wanted = address
            port = on_loop(self._listen(address))
        except (OSError, RuntimeError) as error:
            self.stop(0)
            raise DeviceError(f"cannot listen on {wanted}: it is in use or no address of this machine; port 0 takes a free one") from error
        manifest, cache = self.engine.manifest, self.cache
        return Announcement(
            manifest.model_name,
            manifest.model_version,
            self.engine.device.name,
            self.config.host,
            port,
            metrics,
            None if cache is None else cache.stats().entities,
            None if cache is None else cache.key,
        )

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse new requests, give those under way `grace_s` (default: drain_s) seconds, write the log."""
        on_loop(self._end(self.config.drain_s if grace_s is None else grace_s))
        self.front.dispatcher.close()
        self.host.close()
        if self.log is not None:
            self.log.close()
        self.telemetry.close()

    async def _build(self) -> None:
        limit = self.config.max_message_bytes
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            options=[
                # Up to here a request is refused by the front, which counts it; gRPC refuses what is larger still unheard.
                ("grpc.max_receive_message_length", min(HEADROOM * limit, MAX_GRPC_BYTES)),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", int(self.config.reuse_port)),
                *OPTIONS,
            ],
        )
        methods = {"Rank": self.front.rank, "Score": self.front.score, "ModelStatus": self.front.model_status}
        self._server.add_generic_rpc_handlers((_Routes(SERVICE, methods, self.telemetry),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def _listen(self, address: str) -> int:
        port = self._server.add_insecure_port(address)
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return port

    async def _end(self, grace_s: float) -> None:
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


class _Routes(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Methods of one service, each from bytes to bytes, so that a message that is none is answered as a wrong request."""

    def __init__(self, service: str, methods: Mapping[str, Method], telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._handlers = {
            f"/{service}/{name}": grpc.unary_unary_rpc_method_handler(self._answer(method)) for name, method in methods.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Handler of a call; counts those too that gRPC refuses itself, since the message is far too large."""
        handler = self._handlers.get(details.method)
        if handler is not None:
            self._telemetry.calls.inc()
        return handler

    def _answer(self, method: Method) -> Callable[[bytes, Any], Awaitable[bytes]]:
        requests = self._telemetry.requests
        ok = requests.labels(grpc.StatusCode.OK.name)

        async def answer(data: bytes, context: Any) -> bytes:
            arrived_ns = time.perf_counter_ns()
            left_s = context.time_remaining()
            call = Call(arrived_ns, None if left_s is None else arrived_ns + int(left_s * 1e9), new_request_id())
            try:
                made = await method(data, call)
            except asyncio.CancelledError:  # the client left
                requests.labels(grpc.StatusCode.CANCELLED.name).inc()
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
                told = refusal(error, call.request_id)
                requests.labels(told.status).inc()
                trailing = [(REQUEST_ID_KEY, call.request_id)]
                if told.retry_after_ms is not None:
                    trailing.append((RETRY_AFTER_KEY, str(told.retry_after_ms)))
                await context.abort(grpc.StatusCode[told.status], told.message, tuple(trailing))
                raise AssertionError("abort raises") from None
            ok.inc()
            return made

        return answer


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
