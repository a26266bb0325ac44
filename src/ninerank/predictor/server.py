"""A bundle, all that is around it, and the ports at which it answers."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ninerank.errors import DeviceError
from ninerank.predictor.admin import admin_port, admin_service
from ninerank.predictor.admission import AdmissionQueue
from ninerank.predictor.announcement import Announcement
from ninerank.predictor.assembly import Assembly
from ninerank.predictor.cache import FeatureCaches
from ninerank.predictor.dispatch import Dispatcher
from ninerank.predictor.engine import Engine
from ninerank.predictor.eventloop import event_loop, on_loop
from ninerank.predictor.front import Front
from ninerank.predictor.grpcport import GrpcPort, Service
from ninerank.predictor.host import ModelHost, SingleModel
from ninerank.predictor.manifest import MANIFEST
from ninerank.predictor.modelstore import open_store
from ninerank.predictor.registry import ModelRegistry, RegistryConfig
from ninerank.predictor.requestlog import RequestLog
from ninerank.predictor.security import Guard, TokenFile
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.telemetry import Telemetry
from ninerank.predictor.tls import server_credentials
from ninerank.proto.v1 import predictor_pb2 as pb

if TYPE_CHECKING:
    from ninerank.predictor.gateway import Gateway

__all__ = ["PredictorServer"]

DEVICE_MERGE = 16
SERVICE = pb.DESCRIPTOR.services_by_name["Predictor"].full_name
STORE_WORKERS = 2


class PredictorServer:
    """A bundle, or a folder or store of models, being served. `start` makes it answer, `stop` lets what is under way finish."""

    def __init__(self, bundle_dir: str | Path, config: ServeConfig) -> None:
        # One thread an operator, however many workers: more of them trample each other's caches and wait for each other.
        torch.set_num_threads(1)
        self.config = config
        self.telemetry = Telemetry()
        is_single = _is_bundle(bundle_dir)
        self.assembly = Assembly(config, self.telemetry, by_version=not is_single)
        self.host: ModelHost
        if is_single:
            self.host = SingleModel(self.assembly.make(Path(bundle_dir)), self.assembly.retire)
        else:
            store = open_store(bundle_dir, config.model_copies)
            registry = ModelRegistry(store, self.assembly, RegistryConfig(poll_s=config.poll_s, drain_s=config.drain_s, keep=config.keep))
            registry.start()
            self.host = registry
        # What waits for a store over the network waits in a thread, and not on the loop that all calls share.
        has_stores = any(caches.stores for caches in self.assembly.caches())
        workers = max(config.workers, STORE_WORKERS) if has_stores else config.workers
        self.queue = AdmissionQueue(config.max_pending, max(workers, 1))
        self.front = Front(
            self.host,
            Dispatcher(self.queue, workers, event_loop(), DEVICE_MERGE if config.merge is None else config.merge),
            max_message_bytes=config.max_message_bytes,
            max_candidates=config.max_candidates,
        )
        self.telemetry.follow(self.host.models, self.queue.stats)
        self._gateway: Gateway | None = None
        self._ports: list[GrpcPort] = on_loop(self._build())

    @property
    def engine(self) -> Engine:
        """The engine of the version that answers a call which names none."""
        with self.host.lease(self.host.models()[0].name, "") as service:
            return service.engine

    @property
    def caches(self) -> FeatureCaches:
        """The first feature caches that are open."""
        return self.assembly.caches()[0]

    @property
    def log(self) -> RequestLog | None:
        """The first request log that is open."""
        return next(iter(self.assembly.logs()), None)

    def start(self) -> Announcement:
        """Listen and answer; raises DeviceError where a port cannot be had."""
        config, metrics = self.config, None
        try:
            if config.metrics_port is not None:
                metrics = self._listen_metrics(config.metrics_port)
            wanted = [config.port] if config.admin_port is None else [config.port, config.admin_port]
            http = None
            if self._gateway is not None and config.http_port is not None:
                http = on_loop(self._gateway.listen(config.host, config.http_port, reuse_port=config.reuse_port))
            taken = [on_loop(port.listen(config.host, number)) for port, number in zip(self._ports, wanted, strict=True)]
        except DeviceError:
            self.stop(0)
            raise
        engine = self.engine
        return Announcement(
            engine.manifest.model_name,
            engine.manifest.model_version,
            engine.device.name,
            config.host,
            taken[0],
            metrics,
            None if config.admin_port is None else taken[1],
            http,
            self.caches.told(),
            self.caches.shared,
        )

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse new requests, give those under way `grace_s` (default: drain_s) seconds, write the log."""
        grace_s = self.config.drain_s if grace_s is None else grace_s
        if self._gateway is not None:
            on_loop(self._gateway.close(grace_s))
        for port in self._ports:
            on_loop(port.close(grace_s))
        self.front.dispatcher.close()
        self.host.close()
        self.telemetry.close()

    async def _build(self) -> list[GrpcPort]:
        config, front, guard = self.config, self.front, _guard(self.config)
        methods = {"Rank": front.rank, "Score": front.score, "ModelStatus": front.model_status}
        services = [Service(SERVICE, methods, {"RankStream": front.rank})]
        if config.open_inference:
            # Its messages bear the names that other packages of the protocol bear: a process can hold one of them.
            from ninerank.predictor.openinference import OpenInference

            services.append(OpenInference(front).service())
        ports = [
            GrpcPort(
                services,
                self.telemetry,
                max_message_bytes=config.max_message_bytes,
                guard=guard,
                credentials=server_credentials(config.security),
                reuse_port=config.reuse_port,
            )
        ]
        if config.http_port is not None:
            from ninerank.predictor.gateway import Gateway

            limit, security = config.max_message_bytes, config.security
            self._gateway = Gateway(front, self.telemetry, max_message_bytes=limit, guard=guard, security=security)
        if config.admin_port is not None:
            ports.append(admin_port(admin_service(self.host.load, self.host.unload), config, self.telemetry.registry))
        return ports

    def _listen_metrics(self, port: int) -> int:
        try:
            return self.telemetry.listen(self.config.host, port)
        except OSError as error:
            where = f"metrics port {port} of {self.config.host}"
            raise DeviceError(f"cannot listen on {where}: it is in use or no address of this machine; port 0 takes a free one") from error


def _is_bundle(place: str | Path) -> bool:
    """Whether `place` is one bundle, or should be: a folder of models has <model>/<version>/manifest.json."""
    return "://" not in str(place) and not any(Path(place).glob(f"*/*/{MANIFEST}"))


def _guard(config: ServeConfig) -> Guard | None:
    security = config.security
    if security.tokens is None and security.client_ca is None:
        return None
    return Guard(None if security.tokens is None else TokenFile(security.tokens), security.requests_per_s)
