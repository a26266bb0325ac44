"""Feature rows by id: memory first, then the store behind it, then the features' defaults.

    ids -> shared table -> those it lacks, or holds past their time: store, each key asked for once at a time -> shared table
        -> those the store failed to give: rows past their time, as far as the policy allows -> columns

Shape legend: N ids of a request, M of them asked of the store.
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError, RequestError, nearest
from ninerank.features.columns import conform
from ninerank.predictor.cache import slots
from ninerank.predictor.cache.flights import Flights
from ninerank.predictor.cache.layout import BAD
from ninerank.predictor.cache.shared import Ids, SharedTable
from ninerank.predictor.cache.source import CacheStats, EntityRows
from ninerank.predictor.cache.value import Packed, RowFormat

__all__ = ["CachePolicy", "FeatureCache", "Store", "StoreReply"]

log = logging.getLogger(__name__)

WRITE_WAIT_S = 0.002  # a request rather does without the cache than wait for it
FOUND, ABSENT, FAILED = range(3)


@dataclass(frozen=True)
class StoreReply:
    """Values in the order of the keys, None where there is none. failed: which of those may be there, but the store failed; None: none."""

    values: Sequence[bytes | None]
    failed: Sequence[bool] | None = None


class Store(Protocol):
    """Packed values by key, somewhere else; called by any number of threads at once."""

    timeout_s: float
    """What `get` takes at most."""

    def get(self, keys: Sequence[bytes], deadline_ns: int) -> StoreReply:
        """Values of `keys` by `deadline_ns` (perf_counter). Never raises for a store that fails: it says so in the reply."""

    def state(self) -> str:
        """How the store does, in a word."""


class CachePolicy(Config):
    """How long rows of a store are good for. A cache without a store keeps its rows for ever.

    ttl_s: seconds until a row is asked for anew, up to ttl_jitter of it less, by chance, so that rows put together are not missed
    together. negative_ttl_s: the same for ids that do not exist. max_stale_s: seconds beyond ttl_s for which a row stands in while the
    store fails.
    """

    ttl_s: float = Field(default=60.0, gt=0, le=1e9)
    ttl_jitter: float = Field(default=0.1, ge=0, le=1)
    negative_ttl_s: float = Field(default=5.0, ge=0, le=1e9)
    max_stale_s: float = Field(default=3600.0, ge=0, le=1e9)


class FeatureCache:
    """Feature rows of one kind of entity, in at most `capacity_bytes` of memory that processes share; CLOCK evicts.

    schema: the columns kept, `key` among them. store: where rows come from that the memory lacks. shared: path of another process's
    memory (`path`), used instead of its own if it is there and holds the same columns. called: what errors call the ids.

    >>> cache = FeatureCache(pa.schema({"id": pa.string(), "price": pa.float64()}), key="id", capacity_bytes=1 << 20)
    >>> cache.put(pa.record_batch({"id": ["a", "b"], "price": [1.0, 2.0]}))
    0
    >>> rows = cache.fetch(pa.array(["b", "x"]))
    >>> rows.columns["price"].to_pylist(), rows.known_N.tolist()
    ([2.0, None], [True, False])
    """

    def __init__(
        self,
        schema: pa.Schema,
        *,
        key: str,
        capacity_bytes: int,
        store: Store | None = None,
        policy: CachePolicy | None = None,
        shared: str | None = None,
        called: str = "candidate ids",
    ) -> None:
        if key not in schema.names:
            raise DataError(f"key column {key!r} is missing; {nearest(key, schema.names)}")
        self._called = called
        self.schema, self.key, self.policy = schema, key, policy or CachePolicy()
        self.row_format = RowFormat(schema.remove(schema.get_field_index(key)))
        self._key_type = schema.field(key).type
        self._store = store
        attached = None if shared is None else self._attach(shared)
        self._table = attached or SharedTable(self.row_format, capacity_bytes)
        self.is_shared = attached is not None
        """Whether the memory is another process's, which filled it."""
        self._flights: Flights[Any, tuple[bytes | None, int]] = Flights()
        self._counts, self._bad = Counter[str](), Counter[str]()
        self._bad_told = set[str]()
        self._lock = threading.Lock()

    def _attach(self, path: str) -> SharedTable | None:
        """Another process's memory; None where that is gone or holds other columns, as while versions of a model change."""
        try:
            return SharedTable.attach(self.row_format, path)
        except DataError as error:
            log.info("%s; this process keeps its own", error)
            return None

    @property
    def path(self) -> str:
        """What other processes of this machine pass as `shared`."""
        return self._table.path

    def put(self, rows: pa.RecordBatch, event_time_us: int | npt.NDArray[np.int64] = 0) -> int:
        """Insert or replace rows, which have the cache's columns; of an id that comes twice the later event time, then the last row counts.

        Returns how many other rows had to go. Raises DataError for a missing id and for a row larger than the cache.
        """
        keys = rows.column(self.key)
        if keys.null_count:
            raise DataError(f"column {self.key!r}, row {keys.is_null().index(True).as_py()}: an entity without id")
        before = self._table.figures()[2]
        values = self.row_format.encode(rows, event_time_us)
        result_N = self._table.put(Ids(keys), values)
        too_large_N = result_N == slots.TOO_LARGE
        if too_large_N.any():
            row = int(too_large_N.argmax())
            raise DataError(
                f"id {keys[row].as_py()!r}: a row of {int(values.length_N[row]):,} bytes does not fit into a feature cache of "
                f"{self._table.capacity_bytes:,}"
            )
        return self._table.figures()[2] - before

    def fetch(self, ids: pa.Array, deadline_ns: int | None = None) -> EntityRows:
        """Rows of `ids`, in their order; the key column holds the ids themselves, known or not.

        deadline_ns (perf_counter): no answer of the store is waited for beyond it.
        """
        ids = self._conform(ids)
        now_ns = time.monotonic_ns()
        found = self._table.find(Ids(ids), now_ns)
        status_N, values = found.status_N, found.values
        has_row_N = (status_N == slots.HIT) | (status_N == slots.EXPIRED)
        counts = {
            "hits": int(np.count_nonzero(status_N == slots.HIT)),
            "misses": int(np.count_nonzero(status_N == slots.MISS)),
            "negative": int(np.count_nonzero(status_N == slots.NEGATIVE)),
        }
        counts["expired"] = len(ids) - sum(counts.values())
        if self._store is None or counts["hits"] + counts["negative"] == len(ids):
            self._count(counts)
            return EntityRows({self.key: ids, **self.row_format.decode(values)}, has_row_N & (values.length_N > 0))
        return self._complete(ids, found.status_N, values, now_ns - found.fetched_N, counts, deadline_ns)

    def warm(self) -> None:
        """Have every kernel that a request needs compiled before the first one comes; the memory stays as it is."""
        if not self.row_format.names:
            return
        rows = pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in self.row_format.schema], schema=self.row_format.schema)
        values, ids = self.row_format.encode(rows, 0), Ids(pa.array([0]))
        self.row_format.check(values)
        table = SharedTable(self.row_format, self._table.capacity_bytes)  # as large, and never touched beyond its first blocks
        table.put(ids, values)
        self.row_format.decode(table.find(ids, 0).values)
        table.invalidate(ids)
        table.close()

    def invalidate(self, ids: pa.Array) -> int:
        """Rows of `ids` are asked for anew from now on, and stand in if the store fails; how many the memory held."""
        return self._table.invalidate(Ids(self._conform(ids)))

    def invalidate_all(self) -> None:
        """The same of every row."""
        self._table.invalidate_all()

    def clear(self) -> None:
        """Forget every row."""
        self._table.clear()

    def stats(self) -> CacheStats:
        """Counters of this process and sizes at this moment."""
        entities, used_bytes, evictions = self._table.figures()
        state = "" if self._store is None else self._store.state()
        with self._lock:
            counts: dict[str, Any] = {"hits": 0, "misses": 0, **self._counts}
            bad = dict(self._bad)
        return CacheStats(entities, used_bytes, self._table.capacity_bytes, evictions=evictions, store_state=state, bad=bad, **counts)

    def close(self) -> None:
        """Let the memory go."""
        self._table.close()

    def _conform(self, ids: pa.Array) -> pa.Array:
        try:
            return conform(ids, self._key_type, self.key)
        except (DataError, pa.ArrowInvalid) as error:
            raise RequestError(f"{self._called}: {error}") from None

    def _complete(
        self,
        ids: pa.Array,
        status_N: npt.NDArray[np.uint8],
        values: Packed,
        age_N: npt.NDArray[np.int64],
        counts: dict[str, int],
        deadline_ns: int | None,
    ) -> EntityRows:
        """What the memory holds, and for the rest what the store says."""
        asked_N = (status_N != slots.HIT) & (status_N != slots.NEGATIVE) & ids.is_valid().to_numpy(zero_copy_only=False)
        asked_M = asked_N.nonzero()[0]
        answers, bad = self._ask(ids.take(pa.array(asked_M)), deadline_ns)
        outcome_M = np.array([outcome for _, outcome in answers], np.uint8)
        given = Packed.of([value for value, _ in answers])
        limit_ns = int((self.policy.ttl_s + self.policy.max_stale_s) * 1e9)
        stale_M = (outcome_M == FAILED) & (status_N[asked_M] == slots.EXPIRED) & (age_N[asked_M] <= limit_ns)
        taken_M = asked_M[~stale_M]
        values.address_N[taken_M], values.length_N[taken_M] = given.address_N[~stale_M], given.length_N[~stale_M]
        failed_N, stale_N = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        stale_N[asked_M[stale_M]] = True
        failed_N[asked_M[(outcome_M == FAILED) & ~stale_M]] = True
        values = Packed(values.address_N, values.length_N, (*values.held, *given.held))
        self._count(
            {
                **counts,
                "store_found": int(np.count_nonzero(outcome_M == FOUND)),
                "store_absent": int(np.count_nonzero(outcome_M == ABSENT)),
                "store_failed": int(np.count_nonzero(outcome_M == FAILED)),
                "stale": int(np.count_nonzero(stale_M)),
            },
            bad,
        )
        return EntityRows(
            {self.key: ids, **self.row_format.decode(values)},
            values.length_N > 0,
            failed_N if failed_N.any() else None,
            stale_N if stale_M.any() else None,
            int(age_N[stale_N].max() // 1_000_000) if stale_M.any() else 0,
        )

    def _ask(self, ids: pa.Array, deadline_ns: int | None) -> tuple[list[tuple[bytes | None, int]], Counter[str]]:
        """Value and outcome of each id, and what was wrong with values that are none."""
        assert self._store is not None
        limit_ns = time.perf_counter_ns() + int(self._store.timeout_s * 1e9)
        end_ns = limit_ns if deadline_ns is None else min(limit_ns, deadline_ns)
        wanted = ids.to_pylist()
        mine, flight, others = self._flights.board(dict.fromkeys(wanted))
        answers: dict[Any, tuple[bytes | None, int]] = {}
        bad = Counter[str]()
        try:
            if mine:
                answers, bad = self._load(mine, end_ns)
        finally:
            self._flights.land(mine, flight, answers)
        if others:
            answers = dict(answers)
            for key, other in others.items():
                waited = other.wait((end_ns - time.perf_counter_ns()) / 1e9)
                answers[key] = waited.get(key, (None, FAILED))
        return [answers[key] for key in wanted], bad

    def _load(self, keys: list[Any], end_ns: int) -> tuple[dict[Any, tuple[bytes | None, int]], Counter[str]]:
        """Ask the store and keep what it says."""
        assert self._store is not None
        started_ns = time.monotonic_ns()
        reply = self._store.get([str(key).encode() for key in keys], end_ns)
        packed = Packed.of(reply.values)
        bad_M = self.row_format.check(packed)
        failed_M = bad_M > 0
        if reply.failed is not None:
            failed_M |= np.asarray(reply.failed, np.bool_)
        outcome_M = np.where(failed_M, FAILED, np.where(packed.length_N > 0, FOUND, ABSENT))
        keep_M = (~failed_M).nonzero()[0]
        if len(keep_M):
            now_ns, policy = time.monotonic_ns(), self.policy
            jitter_M = 1.0 - policy.ttl_jitter * np.random.default_rng(random.getrandbits(64)).random(len(keep_M))
            ttl_M = np.where(packed.length_N[keep_M] > 0, policy.ttl_s, policy.negative_ttl_s) * jitter_M
            until_M = now_ns + (ttl_M * 1e9).astype(np.int64)
            kept = Packed(packed.address_N[keep_M], packed.length_N[keep_M], packed.held)
            kept_keys = keys if len(keep_M) == len(keys) else [keys[row] for row in keep_M.tolist()]
            result_K = self._table.put(Ids(pa.array(kept_keys, self._key_type)), kept, until_M, started_ns=started_ns, wait_s=WRITE_WAIT_S)
            self._count({"skipped": int(np.count_nonzero(result_K > slots.OLDER))})
        if bad_M.any():
            self._tell(keys, reply.values, bad_M)
        pairs = zip(keys, reply.values, failed_M.tolist(), outcome_M.tolist(), strict=True)
        answers = {key: (None if failed else value, outcome) for key, value, failed, outcome in pairs}
        return answers, Counter(BAD[code] for code in bad_M[bad_M > 0].tolist())

    def _tell(self, keys: list[Any], values: Sequence[bytes | None], bad_M: npt.NDArray[np.uint8]) -> None:
        """Log the first value of each kind that is none: with another schema there will be no other."""
        for code in np.unique(bad_M[bad_M > 0]).tolist():
            with self._lock:
                is_first = BAD[code] not in self._bad_told
                self._bad_told.add(BAD[code])
            if is_first:
                row = int((bad_M == code).argmax())
                what = BAD[code]
                if what == "schema":
                    own = f"{self.row_format.digest.hex()}: {', '.join(self.row_format.names)}"
                    what = f"it is of schema {(values[row] or b'')[8:16].hex()}, this model reads {own}"
                log.warning("features of %s %r cannot be used: %s (told once, counted always)", self.key, keys[row], what)

    def _count(self, counts: dict[str, int], bad: Counter[str] | None = None) -> None:
        with self._lock:
            self._counts.update(counts)
            if bad:
                self._bad.update(bad)
