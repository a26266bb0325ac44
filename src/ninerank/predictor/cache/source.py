"""What the rest of the predictor knows of feature rows by id: what to ask, and what is answered.

Shape legend: N ids of a request.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["CacheStats", "EntityRows", "FeatureSource"]


@dataclass(frozen=True)
class EntityRows:
    """Raw features of N entities: one array a column, missing where there is no row.

    known_N: which ones have a row. failed_N: which ones may have one that could not be read, because the store behind the cache is
    down, slow or emptied, or holds something else in its place; None where nothing failed. stale_N: rows past their time that stand in
    for what could not be read; None where there are none. oldest_ms: age of the oldest of these.
    """

    columns: dict[str, pa.Array]
    known_N: npt.NDArray[np.bool_]
    failed_N: npt.NDArray[np.bool_] | None = None
    stale_N: npt.NDArray[np.bool_] | None = None
    oldest_ms: int = 0


class FeatureSource(Protocol):
    """Raw feature rows by entity id; called by any number of threads at once."""

    key: str
    """Column that holds the ids."""

    def fetch(self, ids: pa.Array, deadline_ns: int | None = None) -> EntityRows:
        """Rows of `ids`, in their order, by `deadline_ns` (perf_counter; None: the store's own timeout).

        Raises RequestError for ids of the wrong type; never for ids that are unknown, nor for a store that fails.
        """


@dataclass(frozen=True)
class CacheStats:
    """Counters of this process since the start, and what the shared memory holds now.

    hits, misses: ids found, and not found, in the cache itself. expired: found, but past their time. negative: known not to exist.
    store_*: ids asked of the store behind it, by what came back. stale: rows served past their time since the store failed.
    bad: values of the store that were garbage, cut off, or of another schema, by what was wrong.
    """

    entities: int
    used_bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evictions: int
    expired: int = 0
    negative: int = 0
    store_found: int = 0
    store_absent: int = 0
    store_failed: int = 0
    stale: int = 0
    skipped: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    store_state: str = ""
