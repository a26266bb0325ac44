"""Embedding tables of raw 64-bit ids: hash map, admission, eviction, growing storage, state by id.

config.py     DynamicTableConfig          admission.py, eviction.py   policies
table.py      DynamicTable: lookup, rows, update, finish_step, state
idmap.py      id -> row                   storage.py, reserve.py      rows that grow without copies
initial.py    first values from the id    rules.py                    the seam to the fused update
state.py      states by raw id, dealt out to any number of processes
source.py     delta export                frozen.py                what serving reads
"""

from ninerank.embedding.dynamic.admission import Always, BloomCounter, ExactCounter, Frequency, Probability
from ninerank.embedding.dynamic.config import DynamicTableConfig
from ninerank.embedding.dynamic.eviction import Capacity, LastSeen, LeastFrequent
from ninerank.embedding.dynamic.frozen import FrozenIds, freeze
from ninerank.embedding.dynamic.idmap import IdMap
from ninerank.embedding.dynamic.initial import initial_values
from ninerank.embedding.dynamic.rules import FusedRule
from ninerank.embedding.dynamic.source import DynamicSource
from ninerank.embedding.dynamic.state import reshard, shard_of
from ninerank.embedding.dynamic.statistics import DynamicTableStatistics
from ninerank.embedding.dynamic.table import DynamicTable

__all__ = [
    "Always",
    "BloomCounter",
    "Capacity",
    "DynamicSource",
    "DynamicTable",
    "DynamicTableConfig",
    "DynamicTableStatistics",
    "ExactCounter",
    "Frequency",
    "FrozenIds",
    "FusedRule",
    "IdMap",
    "LastSeen",
    "LeastFrequent",
    "Probability",
    "freeze",
    "initial_values",
    "reshard",
    "shard_of",
]
