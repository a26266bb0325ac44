"""Features by id, so that requests need to send ids alone: memory that processes share, a store behind it, then defaults.

    source.py                  what is asked and answered: FeatureSource, EntityRows
    lookup.py flights.py       the way of a request through memory and store; each key asked for once at a time
    shared.py slots.py         rows by id in shared memory: the table, and its kernels
    value.py layout.py         the packed value of an entity, and its kernels
    endpoint.py redisstore.py  Redis: its URL; one bounded MGET a node and request (keys, topology, connection, breaker)
    entities.py entityfile.py  which columns are an item's or a user's; Parquet files of them
    opening.py metrics.py      the caches that a server's configuration asks for; what Prometheus is told of them

redis is imported by `connection` and `client` alone.
"""

from ninerank.predictor.cache.entityfile import load_items
from ninerank.predictor.cache.lookup import CachePolicy, FeatureCache, Store, StoreReply
from ninerank.predictor.cache.opening import FeatureCaches, FeatureSettings, open_caches
from ninerank.predictor.cache.source import CacheStats, EntityRows, FeatureSource

__all__ = [
    "CachePolicy",
    "CacheStats",
    "EntityRows",
    "FeatureCache",
    "FeatureCaches",
    "FeatureSettings",
    "FeatureSource",
    "Store",
    "StoreReply",
    "load_items",
    "open_caches",
]
