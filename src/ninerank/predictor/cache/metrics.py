"""What Prometheus is told of caches and stores, read when it asks."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ninerank.predictor.cache.opening import FeatureCaches
from ninerank.predictor.cache.redisstore import RedisStore

__all__ = ["CacheCollector"]

GAUGES = {
    "entities": "Entities in the feature cache, known ones and those known not to exist",
    "used_bytes": "Bytes of ids and values in the feature cache",
    "capacity_bytes": "Bytes that the feature cache may hold",
}
COUNTERS = {
    "hits": "Ids found in the feature cache",
    "misses": "Ids not found in the feature cache",
    "expired": "Ids found in the feature cache past their time",
    "negative": "Ids that the feature cache knew not to exist",
    "evictions": "Rows evicted from the feature cache",
    "stale": "Rows served past their time, since the store failed",
    "skipped": "Rows of the store that the feature cache did not take: too large, changed meanwhile, or another was writing",
}
OUTCOMES = ("found", "absent", "failed")
NODE_COUNTERS = {
    "requests": "Requests to a node of the store",
    "failures": "Requests to a node of the store that failed",
    "emptied": "Answers of a node of the store that had lost what was loaded",
    "opened": "Times that a node's circuit breaker opened",
    "probes": "Probes of a node whose circuit breaker was open",
    "connects": "Connections made to a node of the store",
}
STATES = ("closed", "half-open", "open")


class CacheCollector(Collector):
    """Caches by entity (`item`, `user`; those of models that read other columns are `item-2` and so on), stores by entity and node.

    caches: those that are open when Prometheus asks.
    """

    def __init__(self, caches: Callable[[], Sequence[FeatureCaches]]) -> None:
        self._caches = caches

    def collect(self) -> Iterator[Metric]:
        open_now = self._caches()
        of = {_label(kind, n): cache for n, caches in enumerate(open_now) for kind, cache in caches.of.items()}
        stores = {_label(kind, n): store for n, caches in enumerate(open_now) for kind, store in caches.stores.items()}
        if not of:
            return
        stats = {kind: cache.stats() for kind, cache in of.items()}
        for name, said in GAUGES.items():
            gauge = GaugeMetricFamily(f"ninerank_cache_{name}", said, labels=["entity"])
            for kind, held in stats.items():
                gauge.add_metric([kind], getattr(held, name))
            yield gauge
        for name, said in COUNTERS.items():
            counter = CounterMetricFamily(f"ninerank_cache_{name}", said, labels=["entity"])
            for kind, held in stats.items():
                counter.add_metric([kind], getattr(held, name))
            yield counter
        answers = CounterMetricFamily("ninerank_store_answers", "Ids asked of the store, by what came back", labels=["entity", "outcome"])
        bad = CounterMetricFamily("ninerank_store_bad_values", "Values of the store that are none", labels=["entity", "wrong"])
        for kind in stores:
            for outcome in OUTCOMES:
                answers.add_metric([kind, outcome], getattr(stats[kind], f"store_{outcome}"))
            for wrong, count in stats[kind].bad.items():
                bad.add_metric([kind, wrong], count)
        yield from (answers, bad, *_nodes(stores))


def _label(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}-{number + 1}"


def _nodes(stores: Mapping[str, RedisStore]) -> Iterator[Metric]:
    nodes = {kind: store.nodes() for kind, store in stores.items()}
    state = GaugeMetricFamily("ninerank_store_breaker", "1 for the state of a node's breaker", labels=["entity", "node", "state"])
    for kind, held in nodes.items():
        for node in held:
            for name in STATES:
                state.add_metric([kind, node.address, name], float(node.state == name))
    yield state
    for name, said in NODE_COUNTERS.items():
        counter = CounterMetricFamily(f"ninerank_store_{name}", said, labels=["entity", "node"])
        for kind, held in nodes.items():
            for node in held:
                counter.add_metric([kind, node.address], getattr(node, name))
        yield counter
