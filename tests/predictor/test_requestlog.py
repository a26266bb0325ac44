"""The request log keeps exactly what was scored, never blocks, and never leaves half a file under its name."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import LogConfig, LoggedRequest, RequestLog, read_log, to_table

Rows = Callable[..., pa.RecordBatch]


@pytest.fixture(scope="module")
def engine(bundle_dir: Path) -> Engine:
    return Engine.load(bundle_dir, device="cpu")


@pytest.fixture
def requests(engine: Engine, log_rows: Rows) -> list[LoggedRequest]:
    made = []
    for n in range(12):
        rows = log_rows(1 + 5 * n, seed=n)
        request = engine.schema.rank_input(rows.select(engine.schema.request.names).slice(0, 1), rows.select(engine.schema.item.names))
        ids = None if n == 3 else pa.array([f"c{n}.{i}" for i in range(rows.num_rows)])
        propensities = None if n % 3 else np.linspace(0.1, 1, rows.num_rows)
        about = {"propensity_N": propensities, "defaulted": ("price",)[: n % 2], "unknown": (0,)[: n % 2], "times_us": {"total": 10 * n}}
        scores_NT = engine.rank(request).scores_NT
        made.append(LoggedRequest(f"r{n}", 1000 + n, "small", "7", engine.spec.digest, ids, request, scores_NT, **about))
    return made


def test_what_is_read_back_scores_exactly_the_same(engine: Engine, requests: list[LoggedRequest], tmp_path: Path) -> None:
    with RequestLog(tmp_path, engine.schema, 1, LogConfig(max_rows=5)) as log:
        assert all(log.write(request) for request in requests)
    assert log.stats().written == 12
    assert log.stats().files == len(list(tmp_path.iterdir())) == 3
    back = list(read_log(tmp_path))
    assert [request.request_id for request in back] == [request.request_id for request in requests]
    for was, now in zip(requests, back, strict=True):
        assert now.input.user.equals(was.input.user)
        assert now.input.items.equals(was.input.items)
        assert (now.candidate_ids is None) == (was.candidate_ids is None)
        assert was.candidate_ids is None or now.candidate_ids.equals(was.candidate_ids)
        assert (now.time_us, now.model_name, now.model_version, now.spec_digest) == (was.time_us, "small", "7", engine.spec.digest)
        assert np.array_equal(now.scores_NT, was.scores_NT)
        assert (now.defaulted, now.unknown, now.times_us) == (was.defaulted, was.unknown, was.times_us)
        assert (now.propensity_N is None) == (was.propensity_N is None)
        assert was.propensity_N is None or np.array_equal(now.propensity_N, was.propensity_N)
        assert np.array_equal(engine.rank(now.input).scores_NT, was.scores_NT)


def test_positions_are_places_in_the_order_that_was_returned(engine: Engine, requests: list[LoggedRequest], tmp_path: Path) -> None:
    with RequestLog(tmp_path, engine.schema, 1) as log:
        log.write(requests[4])
    (row,) = pq.read_table(next(tmp_path.iterdir())).to_pylist()
    order = engine.rank(requests[4].input).order
    assert [row["positions"][candidate] for candidate in order] == list(range(len(order)))


def test_logs_of_the_format_before_are_read(engine: Engine, requests: list[LoggedRequest], tmp_path: Path) -> None:
    table = to_table(requests, engine.schema, 1)
    old = table.drop_columns(["positions", "propensities", "defaulted", "unknown", "stage_us"])
    pq.write_table(old.replace_schema_metadata({**table.schema.metadata, b"ninerank.requestlog": b"1"}), tmp_path / "old.parquet")
    back = list(read_log(tmp_path))
    assert [request.request_id for request in back] == [request.request_id for request in requests]
    assert all(request.propensity_N is None and request.times_us == {} for request in back)
    pq.write_table(old.replace_schema_metadata({**table.schema.metadata, b"ninerank.requestlog": b"3"}), tmp_path / "old.parquet")
    with pytest.raises(DataError, match="is no request log of format 1 or 2"):
        list(read_log(tmp_path))


def test_a_full_queue_drops_and_counts_and_does_not_wait(
    engine: Engine, requests: list[LoggedRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()
    write = pq.write_table

    def slow(*args: object, **kwargs: object) -> None:
        started.set()
        go.wait(30)
        write(*args, **kwargs)

    monkeypatch.setattr("ninerank.predictor.requestlog.pq.write_table", slow)
    with RequestLog(tmp_path, engine.schema, 1, LogConfig(max_rows=1, queue_requests=4)) as log:
        log.write(requests[0])
        assert started.wait(30)
        begin = time.monotonic()
        taken = [log.write(requests[1]) for _ in range(10)]
        assert time.monotonic() - begin < 5
        assert taken == [True] * 4 + [False] * 6
        go.set()
    assert (log.stats().written, log.stats().dropped) == (5, 6)
    assert not log.write(requests[0])


def test_time_closes_a_file(engine: Engine, requests: list[LoggedRequest], tmp_path: Path) -> None:
    with RequestLog(tmp_path, engine.schema, 1, LogConfig(max_seconds=0.05)) as log:
        log.write(requests[0])
        deadline = time.monotonic() + 30
        while log.stats().files == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [request.request_id for request in read_log(tmp_path)] == ["r0"]


def test_a_sample_is_taken(engine: Engine, requests: list[LoggedRequest], tmp_path: Path) -> None:
    with RequestLog(tmp_path, engine.schema, 1, LogConfig(sample_rate=0.25, queue_requests=10_000)) as log:
        taken = sum(log.write(requests[0]) for _ in range(2_000))
        assert 350 <= taken <= 650


def test_a_write_that_fails_loses_its_requests_alone(
    engine: Engine, requests: list[LoggedRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = pq.write_table, []

    def fail_once(*args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr("ninerank.predictor.requestlog.pq.write_table", fail_once)
    with RequestLog(tmp_path, engine.schema, 1, LogConfig(max_rows=1)) as log:
        log.write(requests[0])
        log.write(requests[1])
    assert (log.stats().failed, log.stats().written) == (1, 1)
    assert [request.request_id for request in read_log(tmp_path)] == ["r1"]
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_files_that_are_no_log_are_refused(engine: Engine, requests: list[LoggedRequest], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*\.parquet"):
        list(read_log(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_log(tmp_path / "missing.parquet"))
    with RequestLog(tmp_path, engine.schema, 1) as log:
        log.write(requests[5])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_log(file))
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(DataError, match="is no request log"):
        list(read_log(file))
    with pytest.raises(DataError, match="cannot hold the request log"):
        RequestLog(file, engine.schema, 1)
