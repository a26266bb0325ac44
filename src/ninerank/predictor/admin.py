"""What changes a server while it serves: `ninerank.v1.Admin`, on a port of its own with rights of its own."""

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from ninerank.errors import SpecError
from ninerank.predictor.call import Call
from ninerank.predictor.front import message_of, model_message
from ninerank.predictor.grpcport import GrpcPort, Service
from ninerank.predictor.host import ModelState
from ninerank.predictor.security import Guard, TokenFile
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.tls import server_credentials
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["AdminCounters", "admin_port", "admin_service"]

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_MESSAGE_BYTES = 1 << 20
NAME = pb.DESCRIPTOR.services_by_name["Admin"].full_name
Change = Callable[[str, str], ModelState]


def admin_service(load: Change, unload: Change) -> Service:
    """The service around a host's `load` and `unload`, or a supervisor's; they run on threads, since loading takes long."""

    async def load_model(data: bytes, call: Call) -> bytes:
        request = message_of(pb.LoadModelRequest, data)
        state = await asyncio.to_thread(load, request.model_name, request.model_version)
        answer: bytes = pb.LoadModelResponse(model=model_message(state)).SerializeToString()
        return answer

    async def unload_model(data: bytes, call: Call) -> bytes:
        request = message_of(pb.UnloadModelRequest, data)
        state = await asyncio.to_thread(unload, request.model_name, request.model_version)
        answer: bytes = pb.UnloadModelResponse(model=model_message(state)).SerializeToString()
        return answer

    return Service(NAME, {"LoadModel": load_model, "UnloadModel": unload_model})


class AdminCounters:
    """Counts admin calls by status, in a registry of Prometheus."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter("ninerank_admin_requests", "Admin calls answered, by gRPC status", ["status"], registry=registry)

    def arrived(self) -> None:
        """See Counters; what gRPC refuses is of no interest here."""

    def answered(self, status: str) -> None:
        """See Counters."""
        self._requests.labels(status).inc()


def admin_port(service: Service, config: ServeConfig, registry: CollectorRegistry) -> GrpcPort:
    """The port of `service`, made on the event loop. Raises SpecError where anybody at all could change the server."""
    security = config.security
    if security.admin_tokens is None and security.client_ca is None and config.host not in LOOPBACK:
        raise SpecError(f"the admin port at {config.host} is open to the network: give admin tokens or client_ca, or listen on 127.0.0.1")
    tokens = None if security.admin_tokens is None else TokenFile(security.admin_tokens)
    guard = None if tokens is None and security.client_ca is None else Guard(tokens, None)
    return GrpcPort(
        [service], AdminCounters(registry), max_message_bytes=MAX_MESSAGE_BYTES, guard=guard, credentials=server_credentials(security)
    )
