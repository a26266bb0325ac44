"""`ninerank cache` against a real Redis: load, get, stats, and a stream of updates that reaches a running server."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.append(str(Path(__file__).parent))
from redisd import RedisServer

from ninerank.cli.main import main
from ninerank.predictor.cache.endpoint import parse_endpoint
from ninerank.predictor.cache.entities import entity_schema
from ninerank.predictor.cache.updates import UpdateWatcher, Watched
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.engine import Engine
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer

pytestmark = pytest.mark.redis

IDS = [f"i{n}" for n in range(40)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    own = RedisServer(tmp_path_factory.mktemp("redis"))
    yield own
    own.kill()


@pytest.fixture
def url(server: RedisServer) -> str:
    server.client.flushall()
    return f"{server.url}?timeout_ms=2000&connect_timeout_ms=2000"  # a busy machine is no fault


@pytest.fixture(scope="module")
def items(log_rows: Callable[..., pa.RecordBatch], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = log_rows(40, seed=77)
    file = tmp_path_factory.mktemp("items") / "items.parquet"
    pq.write_table(pa.table({"item_id": IDS, **{name: rows.column(name) for name in ("tags", "price", "city")}}), file)
    return file


def run(*words: object) -> int:
    root, own = logging.getLogger(), logging.getLogger("ninerank")
    before = root.handlers[:], root.level, own.level
    try:
        with pytest.raises(SystemExit) as ended:
            main(["cache", *map(str, words)])
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        own.setLevel(before[2])
    return int(ended.value.code or 0)


def test_load_get_and_stats(url: str, items: Path, bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", "--to", url) == 0
    assert "no items were loaded" in capsys.readouterr().out
    assert run("load", items, "--to", url, "--spec", bundle_dir, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["skipped"]) == (40, 0)
    assert run("load", items, "--to", url, "--spec", bundle_dir) == 0
    assert capsys.readouterr().out.startswith("40 items of ")
    assert run("get", "i3", "--to", url, "--spec", bundle_dir) == 0
    row = json.loads(capsys.readouterr().out)
    held = pq.read_table(items).to_pylist()[3]
    assert {name: row[name] for name in ("price", "tags", "city")} == {name: held[name] for name in ("price", "tags", "city")}
    assert abs(row["event_time_us"] / 1e6 - time.time()) < 600
    assert run("stats", "--to", url, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["loaded"]["rows"], told["is_whole"], told["under_way"]) == (40, True, None)
    assert run("stats", "--to", url) == 0
    assert "40 items of items.parquet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("load", "{items}", "--to", "memory:", "--spec", "{bundle}"), "memory: is every server's own"),
        (("load", "{items}", "--to", "redis://127.0.0.1:1", "--spec", "{bundle}"), "refused"),
        (("load", "nowhere.parquet", "--to", "{url}", "--spec", "{bundle}"), "nowhere.parquet: cannot be read"),
        (
            ("load", "{items}", "--to", "{url}", "--spec", "{bundle}", "--kind", "shop"),
            "no such kind of entity; valid: item, user",
        ),
        (("load", "{items}", "--to", "{url}", "--spec", "{bundle}", "--kind", "user"), "key column 'user_id' is missing"),
        (("get", "i999", "--to", "{url}", "--spec", "{bundle}"), "holds nothing, no item"),
        (("get", "list", "--to", "{url}", "--spec", "{bundle}"), "holds a list, no item"),
        (("get", "junk", "--to", "{url}", "--spec", "{bundle}"), "ninerank:item:junk is garbage"),
    ],
)
def test_wrong_input_is_one_line(
    server: RedisServer, url: str, items: Path, bundle_dir: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    server.client.rpush("ninerank:item:list", "x")
    server.client.set("ninerank:item:junk", "x" * 100)
    assert run(*[word.format(items=items, bundle=bundle_dir, url=url) for word in words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_updates_reach_a_running_server(
    server: RedisServer, url: str, items: Path, bundle_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("load", items, "--to", url, "--spec", bundle_dir) == 0
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", features=url, cache={"ttl_s": 1000}))
    try:
        with PredictorClient(f"127.0.0.1:{own.start().port}") as client:
            user: dict[str, Any] = {"user_id": "u1", "age": 30.0, "hour": 7, "history": ["i1"]}
            before = client.rank(user, ids=["i1", "i2"])
            wanted = client.rank(user, {"item_id": ["i1"], "price": [4.5], "tags": [["t1"]], "city": ["rome"]}).scores[0]
            row = {"item_id": "i1", "price": 4.5, "tags": ["t1"], "city": "rome"}
            updates = "ninerank:item!updates"
            server.client.xadd(updates, {"row": json.dumps({**row, "price": 1.0})})
            server.client.xadd(updates, {"row": json.dumps(row)})
            server.client.xadd(updates, {"row": json.dumps({"item_id": "i2"}), "op": "delete"})
            wrong = ["{", "[]", '{"prize": 1}', '{"price": 1}', '{"item_id": "i1", "price": "x"}']
            for junk in ({"x": "y"}, *({"row": text} for text in wrong)):
                server.client.xadd(updates, junk)  # type: ignore[arg-type]
            capsys.readouterr()
            assert run("watch", "--to", url, "--spec", bundle_dir, "--until-empty", "--json") == 0
            assert json.loads(capsys.readouterr().out) == {"written": 1, "deleted": 1, "refused": 6}
            due = time.monotonic() + 10
            while (now := client.rank(user, ids=["i1", "i2"])).defaults_used.unknown_candidates != (1,):
                assert time.monotonic() < due
            assert abs(now.scores[0] - wanted) < 1e-6
            assert abs(before.scores[0] - wanted) > 1e-4
    finally:
        own.stop(0)


def test_a_watcher_takes_up_what_another_of_its_name_left(server: RedisServer, url: str, bundle_dir: Path) -> None:
    endpoint = parse_endpoint(url)
    assert endpoint is not None
    schema = entity_schema(Engine.load(bundle_dir, "cpu").spec, "item", "item_id")
    client: Any = server.client
    for n in range(30):
        client.xadd("ninerank:item!updates", {"row": json.dumps({"item_id": f"i{n}", "price": n})})
    client.xgroup_create("ninerank:item!updates", "ninerank", id="0")
    taken = client.xreadgroup("ninerank", "one", {"ninerank:item!updates": ">"}, count=10)
    assert taken  # and then it died
    watchers = [UpdateWatcher(endpoint, schema, kind="item", key="item_id", consumer=name) for name in ("one", "two")]
    done, told = threading.Event(), list[Watched]()
    threads = [threading.Thread(target=lambda w=w: told.append(w.run(done, until_empty=True))) for w in watchers]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(watched.written for watched in told) == 30
    assert client.xpending("ninerank:item!updates", "ninerank")["pending"] == 0
    assert sum(client.exists(f"ninerank:item:i{n}") for n in range(30)) == 30
