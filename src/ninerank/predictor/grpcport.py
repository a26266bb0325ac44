"""One port that speaks gRPC: services as routes, health, reflection, limits, TLS and tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ninerank.errors import DeviceError
from ninerank.predictor.routes import Counters, Method, Routes
from ninerank.predictor.security import Guard
from ninerank.predictor.serveconfig import MAX_GRPC_BYTES

__all__ = ["GrpcPort", "Service", "address"]

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


@dataclass(frozen=True)
class Service:
    """Methods of a service by name; streams take and give many messages."""

    name: str
    methods: Mapping[str, Method]
    streams: Mapping[str, Method] = field(default_factory=dict)


class GrpcPort:
    """Made and used on the event loop. max_message_bytes: of a request and of an answer.

    guard: who is let in; health is answered to anybody, reflection only where there is no guard.
    """

    def __init__(
        self,
        services: list[Service],
        counters: Counters,
        *,
        max_message_bytes: int,
        guard: Guard | None = None,
        credentials: grpc.ServerCredentials | None = None,
        reuse_port: bool = False,
    ) -> None:
        self._names = ["", *(service.name for service in services)]
        self._credentials = credentials
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            options=[
                # Up to here a request is refused by the front, which counts it; gRPC refuses what is larger still unheard.
                ("grpc.max_receive_message_length", min(HEADROOM * max_message_bytes, MAX_GRPC_BYTES)),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", int(reuse_port)),
                *OPTIONS,
            ],
        )
        routes = [Routes(service.name, service.methods, service.streams, counters, guard) for service in services]
        self._server.add_generic_rpc_handlers(tuple(routes))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if guard is None:
            names = [*self._names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)

    async def listen(self, host: str, port: int) -> int:
        """Answer at `host`:`port` (0: a free one); the port is returned. Raises DeviceError where it cannot be had."""
        where = address(host, port)
        try:
            if self._credentials is None:
                taken = self._server.add_insecure_port(where)
            else:
                taken = self._server.add_secure_port(where, self._credentials)
        except RuntimeError as error:
            raise DeviceError(f"cannot listen on {where}: it is in use or no address of this machine; port 0 takes a free one") from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return taken

    async def close(self, grace_s: float) -> None:
        """Refuse new calls, give those under way `grace_s` seconds."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(grace_s)

    async def _set_health(self, status: Any) -> None:
        for name in self._names:
            await self._health.set(name, status)


def address(host: str, port: int) -> str:
    """host:port, an IPv6 host in brackets.

    >>> address("::1", 80)
    '[::1]:80'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
