"""Features in a real Redis: URLs, keys, the breaker, loading, changes, and what a server makes of them."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parent))
from redisd import RedisServer

from ninerank.errors import DataError, SpecError
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.cache import CachePolicy, FeatureCache
from ninerank.predictor.cache.breaker import CLOSED, HALF_OPEN, OPEN, Breaker
from ninerank.predictor.cache.changes import ChangeFollower, announce, announce_all
from ninerank.predictor.cache.endpoint import parse_endpoint
from ninerank.predictor.cache.entities import entity_columns, entity_schema
from ninerank.predictor.cache.keys import Keys
from ninerank.predictor.cache.loading import load_entities
from ninerank.predictor.cache.redisstore import RedisStore

WANTED = pa.schema({"price": pa.float64(), "tags": pa.list_(pa.string())})
SCHEMA = pa.schema([pa.field("id", pa.string()), *WANTED])


def until(true: Callable[[], Any], what: str, seconds: float = 10.0) -> None:
    due = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < due, what
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://h", {"hosts": (("h", 6379),), "db": 0, "tls": False}),
        (
            "rediss://u:p%40s@h:1/3?timeout_ms=2.5",
            {"hosts": (("h", 1),), "db": 3, "tls": True, "password": "p@s"},
        ),
        ("redis-sentinel://a,b:7/main/2", {"kind": "sentinel", "hosts": (("a", 26379), ("b", 7)), "service": "main", "db": 2}),
        ("redis-cluster://a:1,[::1]:2?tags=8", {"kind": "cluster", "hosts": (("a", 1), ("::1", 2)), "tags": 8}),
        ("unix:///run/redis.sock?db=1", {"hosts": (("/run/redis.sock", 0),), "db": 1}),
    ],
)
def test_urls_are_read(url: str, wanted: dict[str, Any]) -> None:
    endpoint = parse_endpoint(url)
    assert endpoint is not None
    assert {name: getattr(endpoint, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redi://h", "no such kind of store; did you mean 'redis'"),
        ("/items.parquet", "no such kind of store"),
        ("redis://h:99999", "'h:99999' is no address"),
        ("redis://", "'' is no address"),
        ("redis://h?timeoutms=3", "unknown setting 'timeoutms'; did you mean 'timeout_ms'"),
        ("redis://h?timeout_ms=fast", "timeout_ms"),
        ("redis://h/a", "db"),
        ("redis-sentinel://h", "the service is missing"),
        ("redis-cluster://h/1", "no database"),
        ("redis://h?prefix=a{b}", "prefix"),
    ],
)
def test_urls_that_are_none_are_refused_without_the_password(url: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_endpoint(url)
    with pytest.raises(SpecError) as refusal:
        parse_endpoint(url.replace("://", "://me:secret@"))
    assert "secret" not in str(refusal.value)


def test_keys_of_a_cluster_lie_together_by_tag() -> None:
    endpoint = parse_endpoint("redis-cluster://h?tags=8")
    assert endpoint is not None
    keys = Keys(endpoint, "item")
    names = {keys.of(b"%d" % n).rpartition(b":")[0] for n in range(200)}
    assert len(names) == len(set(keys.slots)) == 8
    assert keys.mark_beside(keys.of(b"a:b")) == keys.mark(keys.tag(b"a:b"))
    alone = parse_endpoint("redis://h?prefix=p")
    assert alone is not None
    assert Keys(alone, "user").of(b"7") == b"p:user:7"


def test_a_breaker_opens_probes_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(failures=3, pause_s=1.0, max_pause_s=4.0, clock=lambda: now[0])
    for _ in range(2):
        breaker.failure()
    breaker.success()
    for _ in range(2):
        breaker.failure()
    assert breaker.allows()
    breaker.failure()
    assert (breaker.state, breaker.allows(), breaker.opened) == (OPEN, False, 1)
    breaker.success()  # an answer that was under way
    assert breaker.state == OPEN
    pauses = []
    for _ in range(4):
        start = now[0]
        while not breaker.probe_due():
            now[0] += 0.05
        pauses.append(now[0] - start)
        assert breaker.state == HALF_OPEN
        assert not breaker.allows()
        assert not breaker.probe_due()
        breaker.failure()
    assert 0.75 <= pauses[0] <= 1.3
    assert 1.5 <= pauses[1] <= 2.55
    assert all(3.0 <= pause <= 5.05 for pause in pauses[2:])
    now[0] += 10
    assert breaker.probe_due()
    breaker.success()
    assert (breaker.state, breaker.probes, breaker.opened) == (CLOSED, 5, 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    own = RedisServer(tmp_path_factory.mktemp("redis"))
    yield own
    own.kill()


@pytest.fixture
def url(server: RedisServer) -> str:
    server.client.flushall()
    server.client.config_resetstat()
    return f"{server.url}?timeout_ms=2000&connect_timeout_ms=2000"  # a busy machine is no fault


def items_file(directory: Path, count: int, **columns: Any) -> Path:
    file = directory / "items.parquet"
    table = {"id": [f"i{n}" for n in range(count)], "price": [n / 2 for n in range(count)], "tags": [["a"] * (n % 3) for n in range(count)]}
    pq.write_table(pa.table({**table, **columns}), file)
    return file


def load(file: Path, url: str, **options: Any) -> Any:
    endpoint = parse_endpoint(url)
    assert endpoint is not None
    return load_entities(file, endpoint, WANTED, kind="item", key="id", **options)


class Opened:
    """A cache before the Redis of `url`."""

    def __init__(self, url: str, **policy: Any) -> None:
        endpoint = parse_endpoint(url)
        assert endpoint is not None
        self.endpoint = endpoint
        self.store = RedisStore(endpoint, "item")
        self.cache = FeatureCache(SCHEMA, key="id", capacity_bytes=1 << 20, store=self.store, policy=CachePolicy(**policy))

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()

    def prices(self, *ids: str) -> list[float | None]:
        prices: list[float | None] = self.cache.fetch(pa.array(ids)).columns["price"].to_pylist()
        return prices


@pytest.mark.redis
def test_what_was_loaded_is_found_by_one_mget_a_request(server: RedisServer, url: str, tmp_path: Path) -> None:
    seen: list[int] = []
    report = load(items_file(tmp_path, 5000), url, progress=seen.append)
    assert (report.rows, report.skipped, sum(seen)) == (5000, 0, 5000)
    assert server.client.dbsize() == 5000 + 3  # mark, about, changes
    with Opened(url) as opened:
        server.client.config_resetstat()
        assert opened.prices("i4", "nobody", "i4999") == [2.0, None, 2499.5]
        found = opened.cache.fetch(pa.array([f"i{n}" for n in range(1000)]))
        assert found.known_N.all()
        assert found.failed_N is None
        assert found.columns["tags"].to_pylist()[:4] == [[], ["a"], ["a", "a"], []]
        assert server.calls("mget") == 2
        opened.cache.fetch(pa.array([f"i{n}" for n in range(1000)]))
        assert server.calls("mget") == 2
        (node,) = opened.store.nodes()
        assert (node.state, node.requests, node.failures, node.connects) == ("closed", 2, 0, 1)


@pytest.mark.redis
def test_a_load_that_was_cut_off_goes_on(server: RedisServer, url: str, tmp_path: Path) -> None:
    file = items_file(tmp_path, 7000)

    def stop(more: int, done: list[int] = []) -> None:  # noqa: B006 - counts over the calls
        done.append(more)
        if sum(done) >= 4000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(file, url, progress=stop)
    with Opened(url) as opened:
        # Without the marks nobody takes what is missing for lost.
        assert not server.client.exists(opened.store.keys.mark(0))
    report = load(file, url)
    assert (report.rows, report.skipped) == (3000, 4000)
    assert server.client.dbsize() == 7000 + 3
    assert load(file, url).skipped == 0  # it is done: again means again
    with pytest.raises(DataError, match="an entity without id"):
        load(items_file(tmp_path, 3, id=["a", None, "b"]), url)
    with pytest.raises(DataError, match=r"standalone 127\.0\.0\.1:1: .*refused"):
        load(file, "redis://127.0.0.1:1")


@pytest.mark.redis
def test_a_load_keeps_to_its_rate(url: str, tmp_path: Path) -> None:
    assert load(items_file(tmp_path, 4000), url, rows_per_s=8000).seconds >= 0.49


@pytest.mark.redis
def test_changes_reach_the_memory_of_servers(server: RedisServer, url: str, tmp_path: Path) -> None:
    file = items_file(tmp_path, 10)
    load(file, url)
    with Opened(url, ttl_s=1000) as opened:
        follower = ChangeFollower(opened.cache, opened.endpoint, "item")
        until(lambda: follower._last, "the follower does not listen")
        assert opened.prices("i2", "i4") == [1.0, 2.0]
        load(items_file(tmp_path, 10, price=[9.0] * 10), url)
        until(lambda: opened.prices("i2", "i4") == [9.0, 9.0], "a load is not heard of")
        value = server.client.get("ninerank:item:i2")
        server.client.set("ninerank:item:i4", value)  # type: ignore[arg-type]
        server.client.delete("ninerank:item:i2")
        assert opened.prices("i2", "i4") == [9.0, 9.0]
        announce(server.client, opened.store.keys, ["i2"])
        until(lambda: opened.prices("i2") == [None], "a change is not heard of")
        server.client.execute_command(
            "XADD", opened.store.keys.changes, "*", "nonsense", b"\xff", "id", b"\xff\xfe", "id", "i4", "id", "i5"
        )
        until(lambda: follower.entries >= 3, "an entry is not heard of")
        # A follower that was cut off, and whose stream was replaced meanwhile, takes everything for changed.
        before = opened.cache.stats().expired
        server.client.delete(opened.store.keys.changes)
        server.client.client_kill_filter(_type="normal", skipme=True)
        until(lambda: opened.prices("i4") and opened.cache.stats().expired > before, "a stream that was replaced is not noticed")
        announce_all(server.client, opened.store.keys)
        follower.close()


@pytest.mark.redis
def test_a_server_that_was_emptied_is_told_from_one_that_knows_nothing(server: RedisServer, url: str, tmp_path: Path) -> None:
    load(items_file(tmp_path, 10), url)
    with Opened(url, ttl_s=0.01, negative_ttl_s=0.0, ttl_jitter=0.0) as opened:
        assert opened.prices("i2", "nobody") == [1.0, None]
        server.client.flushall()
        time.sleep(0.02)
        found = opened.cache.fetch(pa.array(["i2", "i3", "nobody"]))
        assert found.columns["price"].to_pylist() == [1.0, None, None]
        assert found.stale_N is not None
        assert found.stale_N.tolist() == [True, False, False]
        assert found.failed_N is not None
        assert found.failed_N.tolist() == [False, True, True]
        assert opened.store.nodes()[0].emptied == 1
        load(items_file(tmp_path, 10), url)
        found = opened.cache.fetch(pa.array(["i2", "i3", "nobody"]))
        assert (found.known_N.tolist(), found.failed_N, found.stale_N) == ([True, True, False], None, None)
    with Opened("redis://127.0.0.1:1") as opened:
        assert opened.store.state() == "down"
        found = opened.cache.fetch(pa.array(["i2"]))
        assert found.failed_N is not None


@pytest.mark.redis
def test_a_password_a_database_and_a_socket(tmp_path: Path) -> None:
    server = RedisServer.__new__(RedisServer)
    path = tmp_path / "r.sock"
    server.__init__(tmp_path / "redis", "--unixsocket", str(path))  # type: ignore[misc]
    try:
        server.client.config_set("requirepass", "s3cret")
        url = f"redis://:s3cret@127.0.0.1:{server.port}/3?timeout_ms=2000"
        load(items_file(tmp_path, 5), url)
        for good in (url, f"unix://:s3cret@{path}?db=3&timeout_ms=2000"):
            with Opened(good) as opened:
                assert opened.prices("i2") == [1.0]
        for bad in (url.replace("s3cret", "wrong"), url.replace("/3?", "/4?")):
            with Opened(bad) as opened:
                assert opened.prices("i2") == [None]
    finally:
        server.kill()


def test_columns_of_users_are_those_of_users(spec: FeatureSpec) -> None:
    assert entity_columns(spec, "user").names == ["user_id", "age", "history"]
    assert entity_columns(spec, "item").names == ["item_id", "tags", "price", "city"]
    assert entity_schema(spec, "item", "sku").names == ["sku", "item_id", "tags", "price", "city"]
