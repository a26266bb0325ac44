"""Sentinel and Cluster with real processes: a failover is followed, a node that dies costs its share, a slot that moves is found."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parent))
from redisd import RedisServer

from ninerank.predictor.cache import CachePolicy, FeatureCache
from ninerank.predictor.cache.changes import ChangeFollower
from ninerank.predictor.cache.endpoint import parse_endpoint
from ninerank.predictor.cache.loading import load_entities
from ninerank.predictor.cache.redisstore import RedisStore

pytestmark = pytest.mark.redis

SCHEMA = pa.schema({"id": pa.int64(), "price": pa.float64()})
IDS = pa.array(range(400))


def until(true: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
    due = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < due, what
        time.sleep(0.05)


def opened(url: str, tmp_path: Path) -> tuple[FeatureCache, RedisStore]:
    endpoint = parse_endpoint(url)
    assert endpoint is not None
    file = tmp_path / "items.parquet"
    pq.write_table(pa.table({"id": range(400), "price": [n / 2 for n in range(400)]}), file)
    assert load_entities(file, endpoint, SCHEMA.remove(0), kind="item", key="id").rows == 400
    store = RedisStore(endpoint, "item")
    policy = CachePolicy(ttl_s=0.01, negative_ttl_s=0.0, max_stale_s=0.0, ttl_jitter=0.0)
    return FeatureCache(SCHEMA, key="id", capacity_bytes=1 << 20, store=store, policy=policy), store


def whole(cache: FeatureCache) -> bool:
    time.sleep(0.02)  # beyond the rows' time
    found = cache.fetch(IDS)
    return found.failed_N is None and found.columns["price"].to_pylist() == [n / 2 for n in range(400)]


def test_a_failover_of_sentinels_is_followed(tmp_path: Path) -> None:
    master = RedisServer(tmp_path / "a")
    replica = RedisServer(tmp_path / "b", "--replicaof", "127.0.0.1", str(master.port))
    settings = [f"monitor main 127.0.0.1 {master.port} 1", "down-after-milliseconds main 500", "failover-timeout main 2000"]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "redis.conf").write_text("".join(f"sentinel {line}\n" for line in settings))
    sentinel = RedisServer(tmp_path / "s", mode=("--sentinel",))
    store = follower = None
    try:
        until(lambda: replica.info("master_link_status") == "up", "the replica does not follow")
        until(lambda: sentinel.client.execute_command("SENTINEL", "REPLICAS", "main"), "the sentinel does not see the replica")
        cache, store = opened(f"redis-sentinel://127.0.0.1:{sentinel.port}/main?timeout_ms=200", tmp_path)
        follower = ChangeFollower(cache, store.endpoint, "item")
        assert whole(cache)
        assert [node.address for node in store.nodes()] == [f"127.0.0.1:{master.port}"]
        until(lambda: replica.client.dbsize() == master.client.dbsize(), "the replica lags")
        master.kill()
        until(lambda: cache.fetch(IDS).failed_N is not None, "nothing is flagged")
        until(lambda: whole(cache), "the new master is not found")
        assert [node.address for node in store.nodes()] == [f"127.0.0.1:{replica.port}"]
        assert replica.info("role") == "master"
        assert store.state() == "up"
    finally:
        for part in (follower, store):
            if part is not None:
                part.close()
        for server in (sentinel, replica, master):
            server.kill()


def test_a_cluster_is_asked_node_by_node(tmp_path: Path) -> None:
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no")
    servers = [RedisServer(tmp_path / str(n), *options) for n in range(3)]
    store = None
    try:
        bounds = [0, 5461, 10923, 16384]
        for server, first, end in zip(servers, bounds, bounds[1:], strict=False):
            server.client.execute_command("CLUSTER", "ADDSLOTS", *range(first, end))
            server.client.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port)
        for server in servers:
            until(lambda s=server: b"cluster_state:ok" in _info(s) and b"cluster_known_nodes:3" in _info(s), "no cluster")  # type: ignore[misc]
        cache, store = opened(f"redis-cluster://127.0.0.1:{servers[0].port}?timeout_ms=200", tmp_path)
        assert sum(server.client.dbsize() for server in servers) == 400 + 64 + 2  # marks, about, changes
        for server in servers:
            server.client.config_resetstat()
        assert whole(cache)
        assert len(store.nodes()) == 3
        assert all(node.requests == 1 and node.connects == 1 for node in store.nodes())  # one exchange a node
        assert sum(server.calls("mget") for server in servers) == 64
        # A node that hangs costs its share and nothing else.
        servers[2].send(signal.SIGSTOP)
        found = None
        due = time.monotonic() + 10
        while store.state() != "part":
            assert time.monotonic() < due
            time.sleep(0.02)
            found = cache.fetch(IDS)
        assert found is not None
        assert found.failed_N is not None
        share = [store.keys.slots[store.keys.tag(b"%d" % n)] >= bounds[2] for n in range(400)]
        assert found.failed_N.tolist() == share
        assert 100 < sum(share) < 170
        assert (found.known_N ^ found.failed_N).all()
        servers[2].send(signal.SIGCONT)
        until(lambda: whole(cache), "the node is not asked again")
        # A slot that moves: the old owner says so, and it is found where it went.
        slot = store.keys.slots[0]
        source = next(n for n in range(3) if bounds[n] <= slot < bounds[n + 1])
        target = (source + 1) % 3
        _move(servers, slot, source, target)
        until(lambda: whole(cache), "the slot is not found")
        assert store._of_tag[0].address[1] == servers[target].port
    finally:
        if store is not None:
            store.close()
        for server in servers:
            server.kill()


def _info(server: RedisServer) -> bytes:
    told: Any = server.client.execute_command("CLUSTER", "INFO")
    return told if isinstance(told, bytes) else "".join(f"{key}:{value}\n" for key, value in told.items()).encode()


def _move(servers: list[RedisServer], slot: int, source: int, target: int) -> None:
    def call(n: int, *words: Any) -> Any:
        return servers[n].client.execute_command(*words)

    ids = {n: call(n, "CLUSTER", "MYID").decode() for n in (source, target)}
    call(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    while keys := call(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
        call(source, "MIGRATE", "127.0.0.1", servers[target].port, "", 0, 5000, "KEYS", *keys)
    for n in range(3):
        call(n, "CLUSTER", "SETSLOT", slot, "NODE", ids[target])
