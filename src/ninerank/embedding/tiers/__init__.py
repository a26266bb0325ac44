"""Embedding tables larger than device memory: a row cache on the device over host memory, or over a file on disk.

config.py    TierConfig                       table.py     TieredTable
cache.py     rows on the device               store.py     all rows, by column        records.py  one row's values and state, side by side
slots.py     which rows are cached: LFU       backing.py   in RAM or in a mapped file
traffic.py   reads ahead, writes behind       scratch.py   the directory of a table on disk
"""

from ninerank.embedding.tiers.backing import kept_columns
from ninerank.embedding.tiers.config import TierConfig
from ninerank.embedding.tiers.statistics import TierStatistics
from ninerank.embedding.tiers.table import TieredTable

__all__ = ["TierConfig", "TierStatistics", "TieredTable", "kept_columns"]
