"""The streaming join against a plain loop over dictionaries, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.errors import DataError, SpecError
from ninerank.evaluation import join
from ninerank.evaluation.join import LabelStream, join_log, read_streams, stream_of
from ninerank.predictor.request import RankInput, RequestSchema
from ninerank.predictor.requestlog import LogConfig, LoggedRequest, RequestLog

SCHEMA = RequestSchema(pa.schema({"user": pa.string()}), pa.schema({"price": pa.float64()}))
DAY_US = 86_400_000_000


def write_log(out: Path, candidates: list[list[str] | None], max_rows: int = 3) -> None:
    """Request n at day n / 4 with these candidate ids, price 10 n + index and falling scores."""
    with RequestLog(out, SCHEMA, 2, LogConfig(max_rows=max_rows)) as log:
        for n, ids in enumerate(candidates):
            count = 2 if ids is None else len(ids)
            items = pa.record_batch({"price": pa.array([10.0 * n + k for k in range(count)], pa.float64())})
            scores = np.stack([np.linspace(0.9, 0.1, count), np.full(count, 0.01 * n)], 1).astype(np.float32)
            features = RankInput(pa.record_batch({"user": [f"u{n % 3}"]}), items)
            own = None if ids is None else pa.array(ids, pa.string())
            chances = np.full(count, 0.5) if n % 2 else None
            assert log.write(LoggedRequest(f"r{n}", n * DAY_US // 4, "m", "1", "d", own, features, scores, chances))


def joined(out: Path) -> list[dict[str, object]]:
    return (
        ds.dataset(out, partitioning="hive", exclude_invalid_files=True)
        .to_table()
        .sort_by([("time_us", "ascending"), ("index", "ascending")])
        .to_pylist()
    )


@settings(max_examples=40)
@given(
    candidates=st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True), min_size=1, max_size=8),
    clicks=st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcdx"), st.integers(-2, 6), st.integers(0, 1)), max_size=30),
    num_buckets=st.integers(1, 5),
)
def test_join_is_that_of_a_plain_loop(
    candidates: list[list[str]], clicks: list[tuple[int, str, int, int]], num_buckets: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("join")
    write_log(out / "log", candidates)  # type: ignore[arg-type]
    rows = [{"rid": f"r{n}", "sku": key, "at": n * DAY_US // 4 + 1_000_000 * after, "hit": hit} for n, key, after, hit in clicks]
    schema = pa.schema({"rid": pa.string(), "sku": pa.string(), "at": pa.int64(), "hit": pa.int64()})
    pq.write_table(pa.Table.from_pylist(rows, schema), out / "clicks.parquet")
    stream = LabelStream(
        files=(out / "clicks.parquet",), request_id="rid", candidate_id="sku", labels={"click": "hit"}, time="at", window_s=3
    )
    wanted = {(f"r{n}", key): 0 for n, ids in enumerate(candidates) for key in ids}
    seen, early, late, orphans, duplicates = set(), 0, 0, 0, 0
    for n, key, after, hit in clicks:
        pair = (f"r{n}", key)
        if pair not in wanted:
            orphans += 1
        elif after < 0 or after > 3:
            early, late = early + (after < 0), late + (after > 3)
        else:
            duplicates += pair in seen
            seen.add(pair)
            wanted[pair] = max(wanted[pair], hit)
    with pytest.MonkeyPatch.context() as patch:
        size = sum(file.stat().st_size for file in (*(out / "log").iterdir(), out / "clicks.parquet"))
        patch.setattr(join, "BUCKET_BYTES", -(-size // num_buckets))
        if clicks and orphans == len(clicks):
            with pytest.raises(DataError, match="labels met a request"):
                join_log(out / "log", [stream], out / "joined")
            assert not (out / "joined").exists()
            return
        counts = join_log(out / "log", [stream], out / "joined", keep=["user", "price"])
    found = joined(out / "joined")
    assert {(row["request_id"], row["candidate_id"]): row["click"] for row in found} == wanted
    assert (counts.early, counts.late, counts.orphans, counts.duplicates) == (early, late, orphans, duplicates)
    assert (counts.requests, counts.candidates, counts.rows) == (len(candidates), len(wanted), len(clicks))
    assert counts.positives == {"click": sum(wanted.values())}
    for row in found:
        n = int(str(row["request_id"])[1:])
        assert (row["user"], row["price"]) == (f"u{n % 3}", 10.0 * n + row["index"])  # type: ignore[operator]
        assert row["position"] == row["index"]
        assert row["propensity"] == (0.5 if n % 2 else None)
        assert str(row["date"]) == str(np.datetime64(n // 4, "D"))
    assert json.loads((out / "joined" / "join.json").read_text()) == counts.as_dict()


def test_two_streams_in_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "BUCKET_BYTES", 4000)
    write_log(tmp_path / "log", [["a", "b"], ["a"], None, ["c", "d"]], max_rows=2)
    pq.write_table(pa.table({"request_id": ["r0", "r3"], "candidate_id": ["b", "c"]}), tmp_path / "clicks.parquet")
    pq.write_table(pa.table({"request_id": ["r3"], "candidate_id": ["c"], "bought": [1]}), tmp_path / "orders.parquet")
    text = "streams:\n- {files: [clicks.parquet], labels: {click: null}}\n- {files: [orders.parquet], labels: {order: bought}}\n"
    (tmp_path / "streams.yaml").write_text(text)
    counts = join_log(tmp_path / "log", read_streams(tmp_path / "streams.yaml"), tmp_path / "out", processes=2)
    assert counts.positives == {"click": 2, "order": 1}
    assert (counts.rows, counts.orphans, counts.candidates) == (3, 0, 7)
    rows = {(row["request_id"], row["candidate_id"]): (row["click"], row["order"]) for row in joined(tmp_path / "out")}
    assert rows[("r0", "b")] == (1, 0)
    assert rows[("r3", "c")] == (1, 1)
    assert rows[("r2", None)] == (0, 0)


def test_what_cannot_be_joined_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [["a"]])
    good = {"request_id": ["r0"], "candidate_id": ["a"], "y": [1]}
    for change, options, said in (
        ({"request_id": None}, {}, "column 'request_id' is missing"),
        ({"y": [2]}, {}, "column 'y': 2 is refused; a label is 0 or 1"),
        ({"candidate_id": pa.array([None], pa.string())}, {}, "column 'candidate_id' holds nulls"),
        ({"request_id": ["other"]}, {}, "none of the 1 labels met"),
        ({}, {"window_s": 5.0}, "window_s = 5 needs the labels' column of times"),
        ({"at": ["soon"]}, {"time": "at"}, "'at' is of type string; a time is"),
    ):
        columns = {name: values for name, values in {**good, **change}.items() if values is not None}
        pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
        stream = stream_of([tmp_path / "labels.parquet"], "click", "y", options.get("time"), options.get("window_s"))  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=said):
            join_log(tmp_path / "log", [stream], tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"log", "labels.parquet"}
    pq.write_table(pa.table(good), tmp_path / "labels.parquet")
    stream = stream_of([tmp_path / "labels.parquet"], "click", "y", None, None)
    with pytest.raises(DataError, match="no logged feature is called 'prise'.*price"):
        join_log(tmp_path / "log", [stream], tmp_path / "out", keep=["prise"])
    with pytest.raises(DataError, match="label 'click' is in two streams"):
        join_log(tmp_path / "log", [stream, stream], tmp_path / "out")
    with pytest.raises(DataError, match="labels.parquet: is no request log"):
        join_log(tmp_path / "labels.parquet", [stream], tmp_path / "out")
    with pytest.raises(DataError, match="is not there"):
        join_log(tmp_path / "nowhere", [stream], tmp_path / "out")
    (tmp_path / "streams.yaml").write_text("streams:\n- {files: [x], label: {}}\n")
    with pytest.raises(SpecError, match="label"):
        read_streams(tmp_path / "streams.yaml")
    join_log(tmp_path / "log", [stream], tmp_path / "out")
    with pytest.raises(DataError, match="is there already"):
        join_log(tmp_path / "log", [stream], tmp_path / "out")


def test_the_command_prints_what_was_met(tmp_path: Path) -> None:
    write_log(tmp_path / "log", [["a", "b"], ["c"]])
    pq.write_table(pa.table({"request_id": ["r0", "r0"], "candidate_id": ["b", "z"]}), tmp_path / "clicks.parquet")
    arguments = ["join", str(tmp_path / "log"), "--labels", str(tmp_path / "clicks.parquet"), "--label", "click", "--keep", "user"]
    result = CliRunner().invoke(build("join"), [*arguments, "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["candidates"], found["rows"], found["orphans"], found["positives"]) == (3, 2, 1, {"click": 1})
    assert [row["user"] for row in joined(tmp_path / "out")] == ["u0", "u0", "u1"]
