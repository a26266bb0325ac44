"""A predictor server under load while its Redis fails in every way: no failed request, every default flagged, and it finds back.

Each test asks Redis or the breaker whether the fault really happened. Latency is told (`pytest -s`), and bounded by the client's deadline
alone: an answer that came too late is a failed request.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parent))
from redisd import Proxy, RedisServer

from ninerank.errors import NinerankError
from ninerank.predictor.cache import CachePolicy
from ninerank.predictor.cache.endpoint import parse_endpoint
from ninerank.predictor.cache.entities import entity_columns
from ninerank.predictor.cache.loading import load_entities
from ninerank.predictor.client import PredictorClient, RankResult
from ninerank.predictor.request import named
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer

pytestmark = pytest.mark.redis

IDS = [f"i{n}" for n in range(40)]
ASKED = [*IDS, "nobody"]
USER = {"user_id": "u1", "hour": 7}
DEADLINE_MS = 1_000
RECOVERY_S = 10.0
TTL_S, MAX_STALE_S = 0.05, 0.4
FULL, DEFAULTS = 0, 1


class Bench:
    """A Redis, a server that reads its features, and what the scores are with and without them."""

    def __init__(self, bundle_dir: Path, rows: pa.RecordBatch, directory: Path, *, proxied: bool = False) -> None:
        self.redis = RedisServer(directory / "redis")
        self.proxy = Proxy(self.redis.port) if proxied else None
        self.files = {"item": directory / "items.parquet", "user": directory / "users.parquet"}
        items = {name: rows.column(name) for name in ("tags", "price", "city")}
        pq.write_table(pa.table({"item_id": IDS, **items}), self.files["item"])
        pq.write_table(pa.table({"user_id": ["u1"], "age": [33.0], "history": [["i1", "i2"]]}), self.files["user"])
        url = f"redis://127.0.0.1:{self.proxy.port if self.proxy else self.redis.port}?timeout_ms=5"
        policy = CachePolicy(ttl_s=TTL_S, negative_ttl_s=TTL_S, max_stale_s=MAX_STALE_S)
        self.server = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", features=url, cache=policy, workers=2))
        self.spec = self.server.engine.spec
        self.load()
        self.target = f"127.0.0.1:{self.server.start().port}"
        self.wanted = {(user, item): self._scores(user, item) for user in (FULL, DEFAULTS) for item in (FULL, DEFAULTS)}

    def load(self) -> None:
        endpoint = parse_endpoint(self.redis.url)
        assert endpoint is not None
        for kind, file in self.files.items():
            load_entities(file, endpoint, entity_columns(self.spec, kind), kind=kind, key=f"{kind}_id")

    def _scores(self, user: int, item: int) -> npt.NDArray[np.float32]:
        schema = self.server.engine.schema
        sent = {name: pa.array([value]) for name, value in USER.items()}
        if user == FULL:
            sent |= named(_rows(self.files["user"]))
        columns: dict[str, Any] = {"item_id": pa.array(ASKED)}
        if item == FULL:
            held = named(_rows(self.files["item"]).select(["tags", "price", "city"]))
            columns |= {name: pa.concat_arrays([column, pa.nulls(1, column.type)]) for name, column in held.items()}
        request = schema.rank_input(pa.RecordBatch.from_pydict(sent), pa.RecordBatch.from_pydict(columns))
        return self.server.engine.rank(request).scores_NT[:, 0]

    def check(self, result: RankResult) -> str | None:
        """What is wrong with an answer: a score that is neither that of the features nor flagged as one of defaults."""
        lacking = result.defaults_used
        user = DEFAULTS if lacking.failed_user or lacking.unknown_user else FULL
        without = set(lacking.failed_candidates) | set(lacking.unknown_candidates)
        for row in range(len(ASKED)):
            score = self.wanted[user, DEFAULTS if row in without else FULL][row]
            if abs(score - result.scores[row]) > 1e-5:
                return f"candidate {row}: {result.scores[row]} for {score}, user {user}, flagged {row in without}, {lacking}"
        return None if ASKED.index("nobody") in without else f"the unknown one is not flagged: {lacking}"

    def nodes(self) -> dict[str, Any]:
        """Counters of the item store's one node."""
        (node,) = self.server.caches.stores["item"].nodes()
        return dict(vars(node))

    def close(self) -> None:
        self.server.stop(0)
        self.redis.kill()
        if self.proxy is not None:
            self.proxy.close()


def _rows(file: Path) -> pa.RecordBatch:
    return pq.read_table(file).combine_chunks().to_batches()[0]


class Load:
    """Requests from several threads, checked one by one, while the block runs; `result` is the newest answer."""

    def __init__(self, bench: Bench, threads: int = 3) -> None:
        self.bench, self.wrong, self.times_ms = bench, list[str](), list[float]()
        self.failed = self.stale = 0
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        self.until(lambda: len(self.times_ms) > 20, "the load does not start")
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            assert self.wrong == []
            told = np.percentile(self.times_ms, [50, 99, 100])
            print(f"{len(self.times_ms)} requests: p50 {told[0]:.1f}, p99 {told[1]:.1f}, worst {told[2]:.1f} ms; ", end="")
            print(f"{self.failed} with defaults, {self.stale} with old rows; {self.bench.nodes()}")

    def _ask(self) -> None:
        with PredictorClient(self.bench.target, timeout_ms=DEADLINE_MS) as client:
            while not self._done.is_set():
                start = time.perf_counter()
                try:
                    result = client.rank(USER, ids=ASKED)
                except NinerankError as error:
                    self.wrong.append(f"failed request: {error}")
                    continue
                self.times_ms.append((time.perf_counter() - start) * 1e3)
                wrong = self.bench.check(result)
                if wrong is not None:
                    self.wrong.append(wrong)
                self.failed += bool(result.defaults_used.failed_candidates)
                self.stale += bool(result.staleness)
                self.result = result

    def until(self, true: Callable[[], Any], what: str, seconds: float = RECOVERY_S) -> None:
        due = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < due, what
            time.sleep(0.005)

    def healthy(self) -> bool:
        """Whether the newest answer has every feature, and fresh ones."""
        result = self.result
        flagged = result.defaults_used
        return not (flagged.failed_candidates or flagged.failed_user or result.staleness) and flagged.unknown_candidates == (40,)


@pytest.fixture(scope="module")
def bench(bundle_dir: Path, log_rows: Callable[..., pa.RecordBatch], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    own = Bench(bundle_dir, log_rows(40, seed=77), tmp_path_factory.mktemp("faults"))
    yield own
    own.close()


@pytest.fixture
def load(bench: Bench) -> Iterator[Load]:
    """Load that is healthy when the test begins and has to be so again when it ends."""
    if not bench.redis.client.exists("ninerank:item!loaded"):
        bench.load()
    with Load(bench) as own:
        own.until(own.healthy, "not healthy before the fault")
        yield own
        own.until(own.healthy, "not healthy after the fault")


def outage(bench: Bench, load: Load, opened: int) -> None:
    """What every outage longer than the time that old rows are good for shows: the breaker opens, old rows, then defaults."""
    load.until(lambda: bench.nodes()["opened"] > opened, "the breaker does not open")
    load.until(lambda: load.result.staleness or load.result.defaults_used.failed_candidates, "nothing is flagged")
    load.until(lambda: len(load.result.defaults_used.failed_candidates) == 41, "old rows are served beyond their time")
    load.until(lambda: load.result.defaults_used.failed_user, "the user's features are not flagged")
    assert load.stale > 0


def test_redis_that_hangs(bench: Bench, load: Load) -> None:
    opened = bench.nodes()["opened"]
    bench.redis.send(signal.SIGSTOP)
    try:
        outage(bench, load, opened)
        probes = bench.nodes()["probes"]
        load.until(lambda: bench.nodes()["probes"] > probes, "nobody probes")
        assert bench.nodes()["state"] != "closed"
    finally:
        bench.redis.send(signal.SIGCONT)


def test_redis_that_is_killed_and_comes_back_with_its_data(bench: Bench, load: Load) -> None:
    bench.redis.client.save()
    opened, connects = bench.nodes()["opened"], bench.nodes()["connects"]
    bench.redis.kill()
    outage(bench, load, opened)
    bench.redis.start()
    assert bench.redis.info("uptime_in_seconds") < 5
    load.until(load.healthy, "it does not find back")
    assert bench.nodes()["connects"] > connects
    assert bench.redis.info("total_connections_received") > 1


def test_redis_that_is_restarted_empty(bench: Bench, load: Load) -> None:
    emptied = bench.nodes()["emptied"]
    bench.redis.kill()
    for file in bench.redis.directory.glob("*.rdb"):
        file.unlink()
    bench.redis.start()
    assert bench.redis.client.dbsize() == 0
    load.until(lambda: bench.nodes()["emptied"] > emptied, "that it is empty is not noticed")
    load.until(lambda: len(load.result.defaults_used.failed_candidates) == 41, "what was lost is not flagged")
    bench.load()


def test_redis_that_is_flushed(bench: Bench, load: Load) -> None:
    emptied, stale = bench.nodes()["emptied"], load.stale
    bench.redis.client.flushall()
    assert bench.redis.calls("flushall") == 1
    load.until(lambda: bench.nodes()["emptied"] > emptied, "that it is empty is not noticed")
    load.until(lambda: len(load.result.defaults_used.failed_candidates) == 41, "what was lost is not flagged")
    assert load.stale > stale  # first the old rows
    bench.load()


def test_values_of_another_type(bench: Bench, load: Load) -> None:
    client = bench.redis.client
    for name in IDS[:20]:
        key = f"ninerank:item:{name}"
        client.delete(key)
        client.rpush(key, "a", "b")
    assert client.type("ninerank:item:i3") == b"list"
    load.until(lambda: {*range(20), 40} <= set(load.result.defaults_used.unknown_candidates), "lists are not flagged")
    assert not set(load.result.defaults_used.unknown_candidates) & set(range(20, 40))
    assert bench.nodes()["state"] == "closed"
    for name in IDS[:20]:
        client.delete(f"ninerank:item:{name}")
    bench.load()


@pytest.mark.parametrize(
    ("wrong", "damage"),
    [
        ("truncated", lambda value: value[:-5]),
        ("garbage", lambda value: b"\x00" + value[1:]),
        ("schema", lambda value: value[:8] + b"another!" + value[16:]),
        ("version", lambda value: value[:3] + b"\x09" + value[4:]),
    ],
)
def test_values_that_are_none(bench: Bench, load: Load, wrong: str, damage: Callable[[bytes], bytes]) -> None:
    client, before = bench.redis.client, bench.server.caches.of["item"].stats().bad.get(wrong, 0)
    for name in IDS[:20]:
        value: Any = client.get(f"ninerank:item:{name}")
        client.set(f"ninerank:item:{name}", damage(value))
    load.until(lambda: set(load.result.defaults_used.failed_candidates) == set(range(20)), "damaged values are not flagged")
    assert bench.server.caches.of["item"].stats().bad[wrong] >= before + 20
    assert bench.nodes()["state"] == "closed"
    bench.load()


def test_redis_that_takes_no_more_connections(bench: Bench, load: Load) -> None:
    client, opened = bench.redis.client, bench.nodes()["opened"]
    rejected = bench.redis.info("rejected_connections")
    client.config_set("maxclients", 1)
    try:
        client.client_kill_filter(_type="normal", skipme=True)
        outage(bench, load, opened)
        assert bench.redis.info("rejected_connections") > rejected
    finally:
        client.config_set("maxclients", 1000)


@pytest.mark.parametrize("kind", ["late", "dripping"])
def test_redis_that_is_slow(bundle_dir: Path, log_rows: Callable[..., pa.RecordBatch], tmp_path: Path, kind: str) -> None:
    bench = Bench(bundle_dir, log_rows(40, seed=77), tmp_path, proxied=True)
    assert bench.proxy is not None
    try:
        with Load(bench) as load:
            load.until(load.healthy, "not healthy before the fault")
            opened, delayed = bench.nodes()["opened"], bench.proxy.delayed
            # A byte now and then keeps every single read within its time.
            bench.proxy.delay_s, bench.proxy.drip = (0.05, 0) if kind == "late" else (0.0, 1)
            outage(bench, load, opened)
            assert bench.proxy.delayed > delayed
            bench.proxy.delay_s = bench.proxy.drip = 0
            load.until(load.healthy, "it does not find back")
    finally:
        bench.close()
