"""The feature cache: what was put comes out, within its bytes, from any number of threads."""

import logging
import random
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError, RequestError
from ninerank.predictor.cache import ROW_OVERHEAD_BYTES, FeatureCache, load_items

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


def cache_of(capacity_bytes: int = 1 << 20) -> FeatureCache:
    return FeatureCache(SCHEMA, key="id", capacity_bytes=capacity_bytes)


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


def test_ids_are_read_as_the_key_is() -> None:
    cache = cache_of()
    cache.put(rows(12))
    assert cache.fetch(pa.array(["12", "13"])).known_N.tolist() == [True, False]
    with pytest.raises(RequestError, match="candidate ids: column 'id', row 0: 'x' cannot be an id"):
        cache.fetch(pa.array(["x"]))


def test_bytes_are_bounded_and_what_is_asked_for_stays() -> None:
    capacity = 50 * (ROW_OVERHEAD_BYTES + 500)
    cache = cache_of(capacity)
    rng = random.Random(0)
    cache.put(rows(*range(10)))
    newest: dict[int, int] = dict.fromkeys(range(10), 0)
    for step in range(200):
        assert all(row["price"] == rows(n).to_pylist()[0]["price"] for n, row in enumerate(fetched(cache, *range(10)))), step
        ids = [rng.randrange(10, 400) for _ in range(8)]
        cache.put(rows(*ids, salt=step))
        newest.update(dict.fromkeys(ids, step))
        stats = cache.stats()
        assert stats.used_bytes <= capacity
        sample = [rng.randrange(10, 400) for _ in range(20)]
        known = cache.fetch(pa.array(sample)).known_N
        for n, row, is_known in zip(sample, fetched(cache, *sample), known, strict=True):
            if is_known:
                assert row == rows(n, salt=newest[n]).to_pylist()[0]
    assert cache.stats().evictions > 500


def test_a_put_larger_than_the_cache_keeps_what_fits() -> None:
    cache = cache_of(5_000)
    assert cache.put(rows(*range(100))) > 0
    stats = cache.stats()
    assert 3 < stats.entities < 25
    known = cache.fetch(pa.array(range(100))).known_N
    assert known.sum() == stats.entities
    for n in known.nonzero()[0].tolist():
        assert fetched(cache, n) == rows(n).to_pylist()


def test_rows_that_cannot_be_held_are_refused() -> None:
    with pytest.raises(DataError, match="row 1: an entity without id"):
        cache_of().put(pa.record_batch({**dict(zip(SCHEMA.names, rows(1, 2).columns, strict=True)), "id": pa.array([1, None])}))
    with pytest.raises(DataError, match="id 3: a row of"):
        cache_of(100).put(rows(3))
    with pytest.raises(DataError, match="key column 'cities' is missing; did you mean 'city'"):
        FeatureCache(SCHEMA, key="cities", capacity_bytes=1)


def test_threads_see_whole_rows() -> None:
    cache = cache_of(60 * (ROW_OVERHEAD_BYTES + 500))
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            for row in fetched(cache, *range(100)):
                n = row["id"]
                valid = [row["past"][1]] if row["past"] else []
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
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(1000)], "price": [1.0] * 1000}), file)
    with caplog.at_level(logging.WARNING, logger="ninerank.predictor.cache"):
        cache = load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=20_000)
    assert 0 < cache.stats().entities < 1000
    assert f"{cache.stats().entities} of 1000 rows fit" in caplog.text


def test_files_that_are_no_items_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    with pytest.raises(DataError, match="cannot be read"):
        load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
    file.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
    for table, message in (
        (pa.table({"itm_id": ["a"]}), "key column 'item_id' is missing; did you mean 'itm_id'"),
        (pa.table({"item_id": ["a"], "colour": ["red"]}), "holds none of the item features"),
        (pa.table({"item_id": ["a"], "price": ["cheap"]}), "'price' is of type string"),
        (pa.table({"item_id": ["a", None], "price": [1.0, 2.0]}), "without id"),
    ):
        pq.write_table(table, file)
        with pytest.raises(DataError, match=message):
            load_items(file, ITEM_SCHEMA, key="item_id", capacity_bytes=1 << 20)
