"""`ninerank serve` without its command line: one process or several, until somebody says stop."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ninerank.errors import DeviceError
from ninerank.predictor.admin import admin_port, admin_service
from ninerank.predictor.announcement import Announcement
from ninerank.predictor.eventloop import on_loop
from ninerank.predictor.grpcport import GrpcPort
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.predictor.signals import until_signal, wait
from ninerank.predictor.supervisor import Supervisor

__all__ = ["serve"]


def serve(bundle_dir: str | Path, config: ServeConfig, ready: Callable[[Announcement], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `ready` is called once every process answers. Call it from the main thread."""
    until_signal(lambda done: (_serve_one if config.processes == 1 else _serve_several)(bundle_dir, config, ready, done))


def _serve_one(bundle_dir: str | Path, config: ServeConfig, ready: Callable[[Announcement], None], done: threading.Event) -> None:
    server = PredictorServer(bundle_dir, config)
    try:
        ready(server.start())
        wait(done)
    finally:
        server.stop()


def _serve_several(bundle_dir: str | Path, config: ServeConfig, ready: Callable[[Announcement], None], done: threading.Event) -> None:
    supervisor = Supervisor(bundle_dir, config)
    registry = CollectorRegistry()
    registry.register(_Workers(supervisor))
    admin = http = None
    try:
        announcement = supervisor.start()
        if config.admin_port is not None:
            admin = on_loop(_admin_port(supervisor, config, registry))
            announcement = replace(announcement, admin_port=on_loop(admin.listen(config.host, config.admin_port)))
        if config.metrics_port is not None:
            try:
                http, _ = start_http_server(config.metrics_port, addr=config.host, registry=registry)
            except OSError as error:
                raise DeviceError(f"cannot listen on metrics port {config.metrics_port} of {config.host}: {error}") from error
            announcement = replace(announcement, metrics_port=http.server_port)
        ready(announcement)
        wait(done)
    finally:
        if http is not None:
            http.shutdown()
            http.server_close()
        if admin is not None:
            on_loop(admin.close(0))
        supervisor.stop()


async def _admin_port(supervisor: Supervisor, config: ServeConfig, registry: CollectorRegistry) -> GrpcPort:
    return admin_port(admin_service(supervisor.load, supervisor.unload), config, registry)


class _Workers(Collector):
    """The metrics of all workers, told apart by the label `worker`: a worker that is replaced begins its counters anew, others do not."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "ninerank_workers_replaced", "Worker processes that ended and were replaced", value=self._supervisor.replaced
        )
        families: dict[str, Metric] = {}
        for place, text in self._supervisor.call("metrics").items():
            for family in text_string_to_metric_families(text):
                joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    joined.add_sample(sample.name, {**sample.labels, "worker": str(place)}, sample.value)
        yield from families.values()
