"""What Prometheus is told of a server: requests by status, time per stage, candidates, defaults, cache and log.

Every server has a registry of its own, so that two in one process, or a test, do not meet in a global one.
"""

import threading
import time
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ninerank.predictor.cache import FeatureCaches
from ninerank.predictor.cache.metrics import CacheCollector
from ninerank.predictor.manifest import Manifest
from ninerank.predictor.requestlog import RequestLog

__all__ = ["STAGES", "Telemetry"]

STAGES = ("queue", "decode", "cache", "transform", "lookup", "compute", "total")
STAGE_BUCKETS_S = (1e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.25, 1.0)
CANDIDATE_BUCKETS = (1, 10, 50, 100, 200, 300, 500, 1_000, 2_000, 5_000, 10_000)


class Telemetry:
    """Metrics of one server, under the names `ninerank_*`."""

    def __init__(self, manifest: Manifest, caches: FeatureCaches | None = None, request_log: RequestLog | None = None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("ninerank_requests", "Requests answered, by gRPC status", ["status"], registry=self.registry)
        self.calls = Counter(
            "ninerank_calls",
            "Rank calls that arrived; those that are in no ninerank_requests_total were refused by gRPC",
            registry=self.registry,
        )
        self._stage = Histogram(
            "ninerank_stage_seconds", "Time per stage of an answered request", ["stage"], buckets=STAGE_BUCKETS_S, registry=self.registry
        )
        self._stages = {stage: self._stage.labels(stage) for stage in STAGES}
        self.candidates = Histogram("ninerank_candidates", "Candidates per request", buckets=CANDIDATE_BUCKETS, registry=self.registry)
        self.defaulted_columns = Counter(
            "ninerank_defaulted_columns", "Requests in which a column took the feature's default", ["column"], registry=self.registry
        )
        self.unknown_candidates = Counter(
            "ninerank_unknown_candidates", "Candidates whose id the feature cache did not know", registry=self.registry
        )
        self.failed_candidates = Counter(
            "ninerank_failed_candidates", "Candidates whose features could not be read from the store", registry=self.registry
        )
        self.stale_candidates = Counter(
            "ninerank_stale_candidates", "Candidates whose features were past their time, since the store failed", registry=self.registry
        )
        self.users = Counter("ninerank_users", "Users looked up by id, by what came of it", ["outcome"], registry=self.registry)
        self.registry.register(_Held(manifest, request_log))
        if caches is not None:
            self.registry.register(CacheCollector(caches))
        self._http: tuple[WSGIServer, threading.Thread] | None = None

    def arrived(self) -> None:
        """A call came in."""
        self.calls.inc()

    def answered(self, status: str) -> None:
        """A call, or a request of a stream, ended with that gRPC status."""
        self.requests.labels(status).inc()

    def observe_stages(self, times_us: dict[str, int]) -> None:
        """Record microseconds by stage name (one of STAGES)."""
        for stage, value in times_us.items():
            self._stages[stage].observe(value * 1e-6)

    def listen(self, host: str, port: int) -> int:
        """Serve /metrics over HTTP until `close`; port 0 takes a free one, the one taken is returned."""
        self._http = start_http_server(port, addr=host, registry=self.registry)
        return int(self._http[0].server_port)

    def close(self) -> None:
        """Stop serving /metrics."""
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None


class _Held(Collector):
    """Figures that others hold, read when Prometheus asks."""

    def __init__(self, manifest: Manifest, request_log: RequestLog | None) -> None:
        self._manifest, self._log = manifest, request_log
        self._started = time.time()

    def collect(self) -> Iterator[Metric]:
        manifest = self._manifest
        yield InfoMetricFamily(
            "ninerank_model",
            "The model that is served",
            value={"name": manifest.model_name, "version": manifest.model_version, "spec_digest": manifest.spec_digest},
        )
        yield GaugeMetricFamily("ninerank_start_time_seconds", "Unix time at which the server started", value=self._started)
        if self._log is not None:
            written = self._log.stats()
            yield CounterMetricFamily("ninerank_log_written", "Requests written to the request log", value=written.written)
            yield CounterMetricFamily("ninerank_log_dropped", "Sampled requests that the log could not take", value=written.dropped)
            yield CounterMetricFamily("ninerank_log_failed", "Requests lost because a log file could not be written", value=written.failed)
