"""Features by id, so that requests need to send ids alone: memory that processes share, a store behind it, then defaults.

source.py                  what is asked and answered: FeatureSource, EntityRows
lookup.py flights.py       the way of a request through memory and store; each key asked for once at a time
shared.py slots.py         rows by id in shared memory: the table, and its kernels
value.py layout.py         the packed value of an entity, and its kernels
entityfile.py              Parquet files of entities
"""

from ninerank.predictor.cache.entityfile import load_items
from ninerank.predictor.cache.lookup import CachePolicy, FeatureCache, Store, StoreReply
from ninerank.predictor.cache.source import CacheStats, EntityRows, FeatureSource

__all__ = ["CachePolicy", "CacheStats", "EntityRows", "FeatureCache", "FeatureSource", "Store", "StoreReply", "load_items"]
