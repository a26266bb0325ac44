"""What Prometheus is told of a server: requests by status, time per stage, candidates, defaults, cache and log.

Every server has a registry of its own, so that two in one process, or a test, do not meet in a global one.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ninerank.predictor.cache import FeatureCaches
from ninerank.predictor.cache.metrics import CacheCollector
from ninerank.predictor.requestlog import RequestLog

if TYPE_CHECKING:
    from ninerank.predictor.admission import QueueStats
    from ninerank.predictor.host import ModelState

__all__ = ["STAGES", "Telemetry"]

STAGES = ("queue", "decode", "cache", "transform", "lookup", "compute", "total")
STAGE_BUCKETS_S = (1e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.25, 1.0)
CANDIDATE_BUCKETS = (1, 10, 50, 100, 200, 300, 500, 1_000, 2_000, 5_000, 10_000)


class Telemetry:
    """Metrics of one server, under the names `ninerank_*`."""

    def __init__(self) -> None:
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
        self._http: tuple[WSGIServer, threading.Thread] | None = None

    def hold(self, caches: Callable[[], Sequence[FeatureCaches]], logs: Callable[[], Sequence[RequestLog]]) -> None:
        """Tell, whenever asked, what these caches and logs have counted."""
        self.registry.register(CacheCollector(caches))
        self.registry.register(_Logs(logs))

    def follow(self, models: Callable[[], Sequence["ModelState"]], queue: Callable[[], "QueueStats"]) -> None:
        """Tell, whenever asked, which models are there and how much waits."""
        self.registry.register(_Models(models))
        self.registry.register(_Queue(queue))

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


class _Models(Collector):
    """Which versions there are, since when, with how many deltas, and how many calls compute with them."""

    def __init__(self, models: Callable[[], Sequence["ModelState"]]) -> None:
        self._models = models
        self._started = time.time()

    def collect(self) -> Iterator[Metric]:
        labels = ["name", "version"]
        info = InfoMetricFamily("ninerank_model", "Model versions that answer")
        families = {
            "loaded_at_s": GaugeMetricFamily(
                "ninerank_model_loaded_time_seconds", "Unix time at which a version was loaded", labels=labels
            ),
            "sequence": GaugeMetricFamily("ninerank_model_delta_sequence", "Deltas applied to the rows of a version", labels=labels),
            "leases": GaugeMetricFamily("ninerank_model_leases", "Calls that compute with a version now", labels=labels),
        }
        states = GaugeMetricFamily("ninerank_model_versions", "Versions by state", labels=["name", "state"])
        counts: dict[tuple[str, str], int] = {}
        for model in self._models():
            counts[model.name, model.state] = counts.get((model.name, model.state), 0) + 1
            if model.state == "READY":
                info.add_metric([], {"name": model.name, "version": model.version, "spec_digest": model.spec_digest})
                for name, family in families.items():
                    family.add_metric([model.name, model.version], getattr(model, name))
        for (name, state), count in counts.items():
            states.add_metric([name, state], count)
        yield from (info, *families.values(), states)
        yield GaugeMetricFamily("ninerank_start_time_seconds", "Unix time at which the server started", value=self._started)


class _Queue(Collector):
    """What waits before the models."""

    def __init__(self, queue: Callable[[], "QueueStats"]) -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        stats = self._queue()
        yield GaugeMetricFamily("ninerank_queue_depth", "Calls that wait", value=stats.waiting)
        yield GaugeMetricFamily("ninerank_queue_running", "Calls that are computed now", value=stats.running)
        yield GaugeMetricFamily("ninerank_queue_capacity", "Calls that are taken in at once", value=stats.capacity)
        yield GaugeMetricFamily("ninerank_queue_expected_wait_seconds", "Wait of a call that comes now", value=stats.expected_wait_s)
        yield CounterMetricFamily("ninerank_queue_refused", "Calls refused since no time or no place was left", value=stats.refused)
        yield CounterMetricFamily(
            "ninerank_queue_late", "Calls dropped since their time ran out before they were computed", value=stats.late
        )
        yield CounterMetricFamily("ninerank_queue_displaced", "Calls refused in favour of a higher priority", value=stats.displaced)


class _Logs(Collector):
    """Request logs, all together."""

    def __init__(self, logs: Callable[[], Sequence[RequestLog]]) -> None:
        self._logs = logs

    def collect(self) -> Iterator[Metric]:
        stats = [log.stats() for log in self._logs()]
        if not stats:
            return
        for name, said in (
            ("written", "Requests written to the request log"),
            ("dropped", "Sampled requests that the log could not take"),
            ("failed", "Requests lost because a log file could not be written"),
        ):
            yield CounterMetricFamily(f"ninerank_log_{name}", said, value=sum(getattr(own, name) for own in stats))
