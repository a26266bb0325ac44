"""`ninerank cache`: features in a Redis, for servers that look them up by id."""

import json
import signal
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ninerank.cli.progress import progress_bar
from ninerank.errors import RequestError

if TYPE_CHECKING:
    import pyarrow as pa

    from ninerank.predictor.cache.endpoint import RedisEndpoint

app = typer.Typer()

To = Annotated[str, typer.Option("--to", metavar="URL", help="The Redis: redis://, redis-sentinel://, redis-cluster://, unix://...")]
Spec = Annotated[Path, typer.Option(help="Bundle or spec whose servers read the features: it names columns and types.")]
Kind = Annotated[str, typer.Option(help="item or user.")]
Key = Annotated[str | None, typer.Option(help="Column of the ids. Default: what `ninerank serve` takes.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def load(
    data: Annotated[Path, typer.Argument(help="Parquet file, one row an entity.")],
    to: To,
    spec: Spec,
    kind: Kind = "item",
    key: Key = None,
    rate: Annotated[float | None, typer.Option(min=1, help="Rows a second, at most.")] = None,
    restart: Annotated[bool, typer.Option(help="Begin anew where an earlier load of the file was cut off.")] = False,
    as_json: Json = False,
) -> None:
    """Write a file of features into a Redis, and tell the servers that read it.

    A load that was cut off goes on where it was. ninerank cache load items.parquet --to redis://localhost --spec BUNDLE
    """
    from ninerank.predictor.cache.entityfile import open_entities
    from ninerank.predictor.cache.loading import load_entities

    endpoint = _endpoint(to)
    schema, key = _schema(spec, kind, key)
    with open_entities(data, schema, key=key) as entities:
        num_rows = entities.num_rows
    with progress_bar(data.name, num_rows) as advance:
        report = load_entities(data, endpoint, schema, kind=kind, key=key, rows_per_s=rate, restart=restart, progress=advance)
    if as_json:
        print(json.dumps(asdict(report), indent=1))
        return
    per_s = report.rows / max(report.seconds, 1e-9)
    earlier = f" ({report.skipped:,} were there from a load that was cut off)" if report.skipped else ""
    print(f"{report.rows:,} {kind}s of {report.value_bytes / 1e6:,.1f} MB in {report.seconds:.1f} s, {per_s:,.0f} a second{earlier}")


@app.command()
def watch(
    to: To,
    spec: Spec,
    kind: Kind = "item",
    key: Key = None,
    consumer: Annotated[str, typer.Option(help="Name of this process among those that share the stream.")] = socket.gethostname(),
    until_empty: Annotated[bool, typer.Option(help="End once nothing waits.")] = False,
    as_json: Json = False,
) -> None:
    """Follow a stream of rows, write them, and tell the servers that hold the old ones, until SIGTERM or Ctrl-C.

    XADD ninerank:item!updates * row '{"item_id": "i7", "price": 2.5}'
    """
    from ninerank.predictor.cache.entities import entity_schema
    from ninerank.predictor.cache.updates import UpdateWatcher, Watched

    endpoint = _endpoint(to)
    _, key = _schema(spec, kind, key)
    watcher = UpdateWatcher(endpoint, entity_schema(_spec(spec), kind, key), kind=kind, key=key, consumer=consumer)
    done, shown = threading.Event(), [time.monotonic()]
    previous = {number: signal.signal(number, lambda *_: done.set()) for number in (signal.SIGTERM, signal.SIGINT)}

    def told(watched: Watched) -> None:
        if not as_json and time.monotonic() >= shown[0]:
            shown[0] = time.monotonic() + 1
            print(_counts(watched), flush=True)

    if not as_json:
        print(f"following {kind} updates of {endpoint.shown} as {consumer}", flush=True)
    try:
        watched = watcher.run(done, told, until_empty=until_empty)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(json.dumps(asdict(watched)) if as_json else _counts(watched))


@app.command()
def get(
    entity: Annotated[str, typer.Argument(metavar="ID")],
    to: To,
    spec: Spec,
    kind: Kind = "item",
    key: Key = None,
) -> None:
    """Print what a Redis holds of one entity, as JSON; exit code 1 where it holds nothing or nothing that servers would take."""
    from ninerank.predictor.cache.client import connect
    from ninerank.predictor.cache.entities import entity_schema
    from ninerank.predictor.cache.keys import Keys
    from ninerank.predictor.cache.value import RowFormat

    endpoint = _endpoint(to)
    _, key = _schema(spec, kind, key)
    schema = entity_schema(_spec(spec), kind, key)
    name = Keys(endpoint, kind).of(entity.encode())
    client = connect(endpoint)
    held = client.type(name)
    if held not in {b"string", "string"}:
        what = "nothing" if held in {b"none", "none"} else f"a {held.decode()}"
        raise RequestError(f"{endpoint.shown}: {name.decode()} holds {what}, no {kind}")
    row = RowFormat(schema.remove(schema.get_field_index(key))).read(client.get(name), f"{name.decode()}")
    print(json.dumps(row, indent=1, ensure_ascii=False))


@app.command()
def stats(to: To, kind: Kind = "item", as_json: Json = False) -> None:
    """Print what was loaded into a Redis, and how many keys it holds."""
    from ninerank.predictor.cache.client import connect
    from ninerank.predictor.cache.keys import Keys

    endpoint = _endpoint(to)
    client, keys = connect(endpoint), Keys(endpoint, kind)
    about, progress = client.get(keys.about), client.get(keys.progress)
    marks = sum(client.exists(mark) for mark in keys.marks())
    told: dict[str, Any] = {
        "endpoint": endpoint.shown,
        "kind": kind,
        "loaded": json.loads(about) if about else None,
        "under_way": json.loads(progress) if progress else None,
        "is_whole": marks == len(keys.marks()),
        "keys": client.dbsize(),
        "changes": client.xlen(keys.changes),
        "updates": client.xlen(keys.updates),
    }
    if as_json:
        print(json.dumps(told, indent=1))
        return
    loaded = told["loaded"]
    print(f"{told['endpoint']}: {told['keys']:,} keys, {told['changes']:,} changes told, {told['updates']:,} updates in the stream")
    if loaded is None:
        print(f"no {kind}s were loaded")
    else:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(loaded["loaded_at_s"]))
        state = "whole" if told["is_whole"] else "EMPTIED since"
        columns = ", ".join(name for name, _ in loaded["columns"])
        print(f"{loaded['rows'] + loaded['skipped']:,} {kind}s of {loaded['file']}, {when}, {state}; {columns} ({loaded['schema_digest']})")


def _endpoint(url: str) -> "RedisEndpoint":
    from ninerank.predictor.cache.endpoint import parse_endpoint

    endpoint = parse_endpoint(url)
    if endpoint is None:
        raise RequestError("memory: is every server's own; the URL of a Redis is needed")
    return endpoint


def _spec(path: Path) -> Any:
    from ninerank.features.spec import FeatureSpec

    return FeatureSpec.load(path / "spec.json" if path.is_dir() else path)


def _schema(path: Path, kind: str, key: str | None) -> tuple["pa.Schema", str]:
    """Columns of that kind of entity, and the column of its ids."""
    from ninerank.predictor.cache.entities import default_item_key, default_user_key, entity_columns
    from ninerank.predictor.cache.keys import KINDS

    if kind not in KINDS:
        raise RequestError(f"--kind {kind!r}: no such kind of entity; valid: {', '.join(KINDS)}")
    spec = _spec(path)
    key = key or (default_item_key(spec) if kind == "item" else default_user_key(spec))
    if key is None:
        raise RequestError(f"{path}: which column holds the ids of {kind}s? name it (--key)")
    return entity_columns(spec, kind), key


def _counts(watched: Any) -> str:
    return f"{watched.written:,} written, {watched.deleted:,} deleted, {watched.refused:,} refused"
