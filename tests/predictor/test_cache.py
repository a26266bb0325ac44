"""The feature cache: what was put comes out, within its bytes, from any number of threads; what the store says, or fails to say."""

import logging
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError, RequestError
from ninerank.predictor.cache import CachePolicy, EntityRows, FeatureCache, StoreReply, load_items
from ninerank.predictor.cache.value import RowFormat

SCHEMA = pa.schema(
    {
        "id": pa.int64(),
        "price": pa.float64(),
        "count": pa.int64(),
        "city": pa.string(),
        "tags": pa.list_(pa.string()),
        "past": pa.list_(pa.int64()),
    }
)
LEAST_BYTES = 60_000


def rows(*ids: int, salt: int = 0) -> pa.RecordBatch:
    def some(value: object, n: int, k: int) -> object:
        return None if (n + k + salt) % 4 == 0 else value

    return pa.record_batch(
        {
            "id": list(ids),
            "price": [some(n / 2 + salt, n, 0) for n in ids],
            "count": [some(n * 3, n, 1) for n in ids],
            "city": [some(f"çity {n % 3}", n, 2) for n in ids],
            "tags": [some([f"t{n}", "x"][: n % 3], n, 3) for n in ids],
            "past": [some([n, salt], n, 0) for n in ids],
        },
        schema=SCHEMA,
    )


def cache_of(capacity_bytes: int = 1 << 20, **more: Any) -> FeatureCache:
    return FeatureCache(SCHEMA, key="id", capacity_bytes=capacity_bytes, **more)


def fetched(cache: FeatureCache, *ids: int) -> list[dict[str, object]]:
    found = cache.fetch(pa.array(ids, pa.int64()))
    batch = pa.RecordBatch.from_arrays([found.columns[name] for name in SCHEMA.names], schema=SCHEMA)
    batch.validate(full=True)
    return batch.to_pylist()


def test_rows_come_back_in_the_order_asked_for_with_unknown_ones_missing() -> None:
    cache = cache_of()
    assert cache.put(rows(*range(100))) == 0
    wanted = {row["id"]: row for row in rows(*range(100)).to_pylist()}
    got = fetched(cache, 7, 500, 7, 0, 99)
    assert [got[0], got[2], got[3], got[4]] == [wanted[7], wanted[7], wanted[0], wanted[99]]
    assert got[1] == {"id": 500, "price": None, "count": None, "city": None, "tags": None, "past": None}
    assert cache.fetch(pa.array([7, 500, None])).known_N.tolist() == [True, False, False]
    stats = cache.stats()
    assert (stats.entities, stats.hits, stats.misses, stats.evictions) == (100, 5, 3, 0)


def test_an_empty_cache_knows_nothing() -> None:
    assert fetched(cache_of(), 1, 2)[1] == {"id": 2, "price": None, "count": None, "city": None, "tags": None, "past": None}
    assert fetched(cache_of()) == []


def test_a_row_put_again_is_replaced() -> None:
    cache = cache_of()
    cache.put(rows(1, 2, 3))
    used = cache.stats().used_bytes
    cache.put(rows(2, salt=1))
    assert fetched(cache, 1, 2) == [rows(1).to_pylist()[0], rows(2, salt=1).to_pylist()[0]]
    cache.put(rows(2))
    assert (cache.stats().entities, cache.stats().used_bytes) == (3, used)
    cache.put(pa.concat_batches([rows(9), rows(9, salt=2)]))
    assert fetched(cache, 9) == rows(9, salt=2).to_pylist()


def test_warming_leaves_no_trace() -> None:
    cache = cache_of(LEAST_BYTES)
    cache.put(rows(0))
    before = cache.stats()
    cache.warm()
    assert cache.stats() == before
    assert fetched(cache, 0) == rows(0).to_pylist()


def test_the_later_event_time_counts() -> None:
    cache = cache_of()
    cache.put(rows(1, salt=1), event_time_us=20)
    cache.put(rows(1, salt=2), event_time_us=10)
    assert fetched(cache, 1) == rows(1, salt=1).to_pylist()
    cache.put(rows(1, salt=3), event_time_us=20)
    assert fetched(cache, 1) == rows(1, salt=3).to_pylist()


def test_ids_are_read_as_the_key_is() -> None:
    cache = cache_of()
    cache.put(rows(12))
    assert cache.fetch(pa.array(["12", "13"])).known_N.tolist() == [True, False]
    with pytest.raises(RequestError, match="candidate ids: column 'id', row 0: 'x' cannot be an id"):
        cache.fetch(pa.array(["x"]))


def test_ids_in_any_layout_of_arrow_find_their_rows() -> None:
    schema = pa.schema({"id": pa.string(), "n": pa.int64()})
    cache = FeatureCache(schema, key="id", capacity_bytes=1 << 20)
    names = ["", "a", "ab", "ü" * 40, "x" * 3000]
    cache.put(pa.record_batch({"id": names[1:], "n": [1, 2, 3, 4]}, schema=schema))
    for ids in (pa.array(names), pa.array(["z", *names]).slice(1), pa.array(names).dictionary_encode(), pa.array(names, pa.large_string())):
        assert cache.fetch(ids).columns["n"].to_pylist() == [None, 1, 2, 3, 4]
    numbers = cache_of()
    numbers.put(rows(5, 6))
    assert numbers.fetch(pa.array([None, 9, 5, None, 6]).slice(1)).known_N.tolist() == [False, True, False, True]


def test_bytes_are_bounded_and_what_is_asked_for_stays() -> None:
    cache = cache_of(LEAST_BYTES)
    rng = random.Random(0)
    cache.put(rows(*range(10)))
    newest: dict[int, int] = dict.fromkeys(range(10), 0)
    for step in range(200):
        assert all(row["price"] == rows(n).to_pylist()[0]["price"] for n, row in enumerate(fetched(cache, *range(10)))), step
        ids = [rng.randrange(10, 400) for _ in range(8)]
        cache.put(rows(*ids, salt=step))
        newest.update(dict.fromkeys(ids, step))
        stats = cache.stats()
        assert stats.used_bytes <= stats.capacity_bytes <= LEAST_BYTES
        sample = [rng.randrange(10, 400) for _ in range(20)]
        known = cache.fetch(pa.array(sample)).known_N
        for n, row, is_known in zip(sample, fetched(cache, *sample), known, strict=True):
            if is_known:
                assert row == rows(n, salt=newest[n]).to_pylist()[0]
    assert cache.stats().evictions > 500


def test_a_put_larger_than_the_cache_keeps_what_fits() -> None:
    cache = cache_of(LEAST_BYTES)
    assert cache.put(rows(*range(400))) > 0
    known = cache.fetch(pa.array(range(400))).known_N
    assert 50 < known.sum() == cache.stats().entities < 400
    for n in known.nonzero()[0].tolist():
        assert fetched(cache, n) == rows(n).to_pylist()


def test_rows_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(DataError, match="row 1: an entity without id"):
        cache_of().put(pa.record_batch({**dict(zip(SCHEMA.names, rows(1, 2).columns, strict=True)), "id": pa.array([1, None])}))
    large = pa.record_batch({**{name: [None] for name in SCHEMA.names}, "id": [3], "city": ["x" * 70_000]}, schema=SCHEMA)
    with pytest.raises(DataError, match="id 3: a row of 70,080 bytes does not fit"):
        cache_of(LEAST_BYTES).put(large)
    with pytest.raises(DataError, match=r"a feature cache of 100 bytes is too small for these features; at least [0-9,]+"):
        cache_of(100)
    with pytest.raises(DataError, match="key column 'cities' is missing; did you mean 'city'"):
        FeatureCache(SCHEMA, key="cities", capacity_bytes=1)


def test_threads_see_whole_rows() -> None:
    cache = cache_of(LEAST_BYTES)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            for row in fetched(cache, *range(100)):
                n: Any = row["id"]
                past: Any = row["past"]
                valid = [past[1]] if past else []
                if row["count"] not in {None, n * 3} or any(row["price"] not in {None, n / 2 + salt} for salt in valid):
                    wrong.append(row)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(150):
        cache.put(rows(*random.Random(step).sample(range(100), 20), salt=step))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


class FakeStore:
    """A store in a dictionary that does what the test says."""

    def __init__(self, *, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self.values: dict[bytes, bytes] = {}
        self.asked: list[bytes] = []
        self.is_down = False
        self.pause = threading.Event()
        self.pause.set()

    def hold(self, batch: pa.RecordBatch, event_time_us: int = 0) -> None:
        form = RowFormat(SCHEMA.remove(0))
        for key, value in zip(batch.column("id").to_pylist(), form.encode(batch, event_time_us).to_bytes(), strict=True):
            self.values[b"%d" % key] = value

    def get(self, keys: Sequence[bytes], deadline_ns: int) -> StoreReply:
        self.asked += keys
        self.pause.wait(10)
        if self.is_down:
            return StoreReply([None] * len(keys), [True] * len(keys))
        return StoreReply([self.values.get(key) for key in keys])

    def state(self) -> str:
        return "down" if self.is_down else "up"


def outcome(found: EntityRows) -> dict[str, Any]:
    """Indices: of rows that are known, that failed, that are stale."""
    given = {"known": found.known_N, "failed": found.failed_N, "stale": found.stale_N}
    return {name: [] if flags is None else flags.nonzero()[0].tolist() for name, flags in given.items()}


def test_what_the_store_gave_is_kept_for_its_time() -> None:
    store = FakeStore()
    store.hold(rows(1, 2))
    cache = cache_of(store=store, policy=CachePolicy(ttl_s=0.4, negative_ttl_s=0.2, ttl_jitter=0.0))
    assert fetched(cache, 1, 9, 1, 2)[0] == rows(1).to_pylist()[0]
    assert store.asked == [b"1", b"9", b"2"]
    fetched(cache, 1, 9, 2)
    assert len(store.asked) == 3
    time.sleep(0.25)
    fetched(cache, 1, 9, 2)
    assert store.asked[3:] == [b"9"]
    time.sleep(0.25)
    store.hold(rows(1, salt=1))
    assert fetched(cache, 1) == rows(1, salt=1).to_pylist()
    stats = cache.stats()
    assert (stats.store_found, stats.store_absent, stats.store_failed) == (4, 2, 0)
    assert (stats.misses, stats.hits, stats.negative, stats.expired) == (4, 4, 1, 2)


def test_times_to_live_are_jittered() -> None:
    store = FakeStore()
    store.hold(rows(*range(200)))
    cache = cache_of(store=store, policy=CachePolicy(ttl_s=0.4, ttl_jitter=1.0))
    fetched(cache, *range(200))
    time.sleep(0.2)
    fetched(cache, *range(200))
    assert 40 < len(store.asked) - 200 < 160


def test_rows_past_their_time_stand_in_while_the_store_fails() -> None:
    store = FakeStore()
    store.hold(rows(1, 2))
    cache = cache_of(store=store, policy=CachePolicy(ttl_s=0.05, negative_ttl_s=0.05, max_stale_s=0.4, ttl_jitter=0.0))
    fetched(cache, 1, 2, 9)
    time.sleep(0.1)
    store.is_down = True
    found = cache.fetch(pa.array([1, 9, 3, 2]))
    assert outcome(found) == {"known": [0, 3], "failed": [1, 2], "stale": [0, 3]}
    assert 100 <= found.oldest_ms < 450
    assert found.columns["city"].to_pylist() == [rows(1).to_pylist()[0]["city"], None, None, None]
    assert (cache.stats().stale, cache.stats().store_state) == (2, "down")
    time.sleep(0.4)
    assert outcome(cache.fetch(pa.array([1, 2]))) == {"known": [], "failed": [0, 1], "stale": []}
    store.is_down = False
    assert outcome(cache.fetch(pa.array([1, 2, 9]))) == {"known": [0, 1], "failed": [], "stale": []}


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        (lambda value: b"hello", "garbage"),
        (lambda value: value[:-8], "truncated"),
        (lambda value: value[:20], "truncated"),
        (lambda value: value[:3] + b"\x02" + value[4:], "version"),
        (lambda value: value[:8] + b"12345678" + value[16:], "schema"),
        (lambda value: value[:60] + bytes([value[60] ^ 1]) + value[61:], "garbage"),
    ],
)
def test_a_value_that_is_none_is_flagged_counted_and_told(what: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    store.hold(rows(1, 2, 3))
    cache = cache_of(store=store, policy=CachePolicy(ttl_s=0.05))
    fetched(cache, 1)
    time.sleep(0.06)
    for key in (b"1", b"2"):
        store.values[key] = what(store.values[key])
    assert outcome(cache.fetch(pa.array([1, 2, 3]))) == {"known": [0, 2], "failed": [1], "stale": [0]}
    assert cache.stats().bad == {kind: 2}
    assert caplog.text.count("cannot be used") == 1
    assert kind in caplog.text


def test_each_key_is_asked_for_once_at_a_time() -> None:
    store = FakeStore()
    store.hold(rows(*range(20)))
    store.pause.clear()
    cache = cache_of(store=store)
    got: list[list[dict[str, object]]] = []
    threads = [threading.Thread(target=lambda: got.append(fetched(cache, *range(20)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    store.pause.set()
    for thread in threads:
        thread.join()
    assert sorted(store.asked) == sorted(b"%d" % n for n in range(20))
    assert got == [rows(*range(20)).to_pylist()] * 6


def test_who_waits_for_another_request_waits_no_longer_than_its_deadline() -> None:
    store = FakeStore()
    store.pause.clear()
    cache = cache_of(store=store)
    first = threading.Thread(target=fetched, args=(cache, 1))
    first.start()
    while not store.asked:
        time.sleep(0.001)
    found = cache.fetch(pa.array([1]), time.perf_counter_ns() + 20_000_000)
    assert outcome(found) == {"known": [], "failed": [0], "stale": []}
    store.pause.set()
    first.join()


def test_what_is_invalidated_while_it_is_fetched_is_not_kept() -> None:
    store = FakeStore()
    store.hold(rows(1, 2))
    cache = cache_of(store=store)
    fetched(cache, 1)
    assert cache.invalidate(pa.array([1, 7])) == 1
    store.hold(rows(1, salt=1))
    assert fetched(cache, 1) == rows(1, salt=1).to_pylist()
    store.pause.clear()
    slow = threading.Thread(target=fetched, args=(cache, 2))
    slow.start()
    while store.asked[-1] != b"2":
        time.sleep(0.001)
    cache.invalidate(pa.array([2]))
    store.pause.set()
    slow.join()
    assert cache.stats().skipped == 1
    store.hold(rows(2, salt=1))
    assert fetched(cache, 2) == rows(2, salt=1).to_pylist()


def test_an_invalidated_row_stands_in_while_the_store_fails() -> None:
    store = FakeStore()
    store.hold(rows(1))
    cache = cache_of(store=store)
    fetched(cache, 1)
    cache.invalidate(pa.array([1]))
    store.is_down = True
    assert outcome(cache.fetch(pa.array([1])))["stale"] == [0]


def test_a_store_that_raises_leaves_no_key_behind() -> None:
    store = FakeStore()
    store.hold(rows(1))
    cache = cache_of(store=store)
    good, store.get = store.get, lambda keys, deadline_ns: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(ZeroDivisionError):
        cache.fetch(pa.array([1]))
    store.get = good  # type: ignore[method-assign]
    assert fetched(cache, 1) == rows(1).to_pylist()


ITEM_SCHEMA = pa.schema({"item_id": pa.string(), "price": pa.float64(), "tags": pa.list_(pa.string())})


def test_items_are_loaded_from_parquet_as_the_spec_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"price": pa.array([1, 2], pa.int32()), "item_id": [10, 20], "colour": ["red", "blue"]}), file)
    cache = load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
    found = cache.fetch(pa.array(["20", "30"]))
    assert found.columns.keys() == {"item_id", "price"}
    assert found.columns["price"].to_pylist() == [2.0, None]


def test_items_may_be_keyed_by_a_column_that_is_no_feature(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"sku": [5, 6], "price": [1.0, 2.0]}), file)
    cache = load_items(file, ITEM_SCHEMA, key="sku", capacity_bytes=1 << 20)
    assert cache.fetch(pa.array([6])).columns["price"].to_pylist() == [2.0]


def test_a_file_larger_than_the_cache_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(1000)], "price": np.ones(1000)}), file)
    with caplog.at_level(logging.WARNING, logger="ninerank.predictor.cache"):
        cache = load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=LEAST_BYTES)
    assert 0 < cache.stats().entities < 1000
    assert f"{cache.stats().entities} of 1000 rows fit" in caplog.text


def test_memory_of_another_is_used_where_it_fits(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["a", "b"], "price": [1.0, 2.0]}), file)
    first = load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
    first.put(pa.record_batch({"item_id": ["b"], "price": [3.0]}))
    second = load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20, shared=first.path)
    assert second.fetch(pa.array(["b"])).columns["price"].to_pylist() == [3.0]
    pq.write_table(pa.table({"item_id": ["b"], "tags": [["x"]]}), file)
    for path in (first.path, "/nowhere"):  # other columns, and a process that is gone
        other = load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20, shared=path)
        assert not other.is_shared
        assert other.fetch(pa.array(["b"])).columns["tags"].to_pylist() == [["x"]]


def test_files_that_are_no_items_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    with pytest.raises(DataError, match="cannot be read"):
        load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
    file.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
    for table, message in (
        (pa.table({"itm_id": ["a"]}), "key column 'item_id' is missing; did you mean 'itm_id'"),
        (pa.table({"item_id": ["a"], "colour": ["red"]}), "holds none of the features"),
        (pa.table({"item_id": ["a"], "price": ["cheap"]}), "'price' is of type string"),
        (pa.table({"item_id": ["a", None], "price": [1.0, 2.0]}), "without id"),
    ):
        pq.write_table(table, file)
        with pytest.raises(DataError, match=message):
            load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
