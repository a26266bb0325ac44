"""A replay as a job: pace and order, shares over processes, scores kept and gone on with."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError, SpecError
from ninerank.evaluation.job import ReplayJob, SnapshotFile, run_job
from ninerank.evaluation.keptscores import KeptScores
from ninerank.evaluation.replayer import Answer, BundleReplayer, Replayer
from ninerank.evaluation.schedule import Schedule, answered, paced, shuffled
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import LogConfig, LoggedRequest, RequestLog, read_log

NUM_REQUESTS = 40


@pytest.fixture(scope="module")
def engine(bundle_dir: Path) -> Engine:
    return Engine.load(bundle_dir, "cpu")


@pytest.fixture(scope="module")
def log_of_requests(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("requestlog")
    rng = np.random.default_rng(1)
    manifest = engine.manifest
    with RequestLog(out, engine.schema, 1, LogConfig(max_rows=7)) as log:
        for n in range(NUM_REQUESTS):
            count = int(rng.integers(1, 6))
            items = pa.record_batch({"item": [f"i{i}" for i in rng.integers(0, 30, count)], "price": rng.lognormal(1, 1, count)})
            features = engine.schema.rank_input(pa.record_batch({"user": [f"u{n}"], "hour": [n % 24]}), items)
            about = (manifest.model_name, manifest.model_version, manifest.spec_digest, None, features, engine.rank(features).scores_NT)
            assert log.write(LoggedRequest(f"r{n:03d}", 1_000_000 + 1000 * n, *about))
    return out


@given(items=st.lists(st.integers(), max_size=50), seed=st.integers(0, 5), window=st.integers(1, 60))
def test_shuffled_holds_the_same_and_repeats(items: list[int], seed: int, window: int) -> None:
    order = list(shuffled(items, seed, window))
    assert sorted(order) == sorted(items)
    assert order == list(shuffled(items, seed, window))


def test_pace_is_that_of_the_rate_or_of_the_log(log_of_requests: Path) -> None:
    requests = list(read_log(log_of_requests))
    for schedule, least_s in ((Schedule(rate=400), 39 / 400), (Schedule(speed=0.5), 39 * 0.002), (Schedule(), 0.0)):
        started = time.monotonic()
        assert [r.request_id for r in paced(requests, schedule)] == [r.request_id for r in requests]
        assert time.monotonic() - started >= least_s
    assert {r.request_id for r in paced(requests, Schedule(shuffle_seed=3))} == {r.request_id for r in requests}
    with pytest.raises(SpecError, match="rate and speed are both given"):
        Schedule.parse({"rate": 1.0, "speed": 1.0}, "replay")
    with pytest.raises(SpecError, match="shuffled requests have not"):
        Schedule.parse({"speed": 1.0, "shuffle_seed": 1}, "replay")


class Slow(Replayer):
    """Later requests answer sooner; counts how many are under way."""

    source, kind = "slow", "endpoint"

    def __init__(self) -> None:
        self.under_way = self.most = 0

    def rank(self, request: LoggedRequest) -> Answer:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        time.sleep(0.001 * (5 - request.time_us // 1000 % 5))
        self.under_way -= 1
        if request.request_id == "r030":
            raise DataError("r030 is refused")
        return Answer(request.scores_NT, "m", "1")


def test_answers_come_in_the_order_of_the_requests_however_many_are_under_way(log_of_requests: Path) -> None:
    requests = [request for request in read_log(log_of_requests) if request.request_id != "r030"]
    replayer = Slow()
    assert [request.request_id for request, _ in answered(iter(requests), replayer, 4)] == [request.request_id for request in requests]
    assert 1 < replayer.most <= 4
    with pytest.raises(DataError, match="r030"):
        list(answered(read_log(log_of_requests), Slow(), 4))


def test_shares_are_every_request_once(log_of_requests: Path) -> None:
    shares = [[request.request_id for request in read_log(log_of_requests, (k, 3))] for k in range(3)]
    assert sorted(request for share in shares for request in share) == [request.request_id for request in read_log(log_of_requests)]
    assert all(shares)


def test_two_processes_find_what_one_finds(log_of_requests: Path, bundle_dir: Path, tmp_path: Path) -> None:
    rows = [{"request_id": r.request_id, "index": 0, "label": n % 2} for n, r in enumerate(read_log(log_of_requests))]
    pa.csv.write_csv(pa.Table.from_pylist([*rows, rows[0], {"request_id": "nobody", "index": 0, "label": 1}]), tmp_path / "labels.csv")
    pa.parquet.write_table(pa.table({"item": [f"i{i}" for i in range(30)], "price": [1.0] * 30}), tmp_path / "items.parquet")
    snapshot = SnapshotFile("item", tmp_path / "items.parquet", "item")
    job = ReplayJob(log_of_requests, bundle_dir, device="cpu", labels=tmp_path / "labels.csv", snapshots=(snapshot,))
    one, two = run_job(job).as_dict(), run_job(job, processes=2).as_dict()
    for found in (one, two):
        for place in (found["quality"]["click"]["logged"], found["quality"]["click"]["again"], found, found["skew"]["parity"]):
            for name in ("seconds", "requests_per_s", "mean_difference", "worst"):
                place.pop(name, None)
            for name, value in place.items():
                if isinstance(value, float):
                    place[name] = pytest.approx(value)
        found["skew"]["columns"]["price"].pop("examples")
    assert one == two
    assert one["labels"] == {"rows": 42, "duplicates": 1, "labelled": 40, "unlabelled": one["labels"]["unlabelled"], "orphans": 1}


@pytest.mark.slow
def test_ray_finds_what_one_process_finds(log_of_requests: Path, bundle_dir: Path) -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = run_job(ReplayJob(log_of_requests, bundle_dir, device="cpu"), processes=2, where="ray")
    finally:
        ray.shutdown()
    assert found.passed
    assert found.parity.num_requests == NUM_REQUESTS


class Counting(Replayer):
    """A bundle that counts what it is asked, and may fail."""

    def __init__(self, engine: Engine, fail_at: int | None = None) -> None:
        self._inner = BundleReplayer(engine, "bundle")
        self.source, self.kind, self.tasks = "bundle", "bundle", ("click",)
        self.count, self._fail_at = 0, fail_at

    def rank(self, request: LoggedRequest) -> Answer:
        if self.count == self._fail_at:
            raise KeyboardInterrupt
        self.count += 1
        return self._inner.rank(request)


def test_an_interrupted_replay_goes_on_where_it_was(
    log_of_requests: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ninerank.evaluation.keptscores.FILE_REQUESTS", 8)
    about: dict[str, object] = {"log": "l", "model": "m"}

    def run(fail_at: int | None) -> tuple[int, list[np.ndarray]]:
        counting, scores = Counting(engine, fail_at), []
        with KeptScores(counting, tmp_path / "work", about) as kept:
            try:
                for request in read_log(log_of_requests):
                    scores.append(kept.rank(request).scores_NT)
            except KeyboardInterrupt:
                pass
        return counting.count, scores

    assert run(21)[0] == 21
    count, scores = run(None)
    assert count == NUM_REQUESTS - 21
    assert all(np.array_equal(a, r.scores_NT) for a, r in zip(scores, read_log(log_of_requests), strict=True))
    assert run(None)[0] == 0
    assert not list((tmp_path / "work").glob("*tmp*"))

    with pytest.raises(DataError, match="scores of another replay \\(model 'm', now 'other'\\)"):
        KeptScores(Counting(engine), tmp_path / "work", {"log": "l", "model": "other"})
    with KeptScores(Counting(engine), tmp_path / "work", about) as kept, pytest.raises(DataError, match="the log changed"):
        kept.rank(replace(next(read_log(log_of_requests)), request_id="x"))
    file = min((tmp_path / "work").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:40])
    with KeptScores(Counting(engine), tmp_path / "work", about) as kept, pytest.raises(DataError, match="to begin anew"):
        kept.rank(next(read_log(log_of_requests)))


def test_a_job_keeps_its_work(log_of_requests: Path, bundle_dir: Path, tmp_path: Path) -> None:
    job = ReplayJob(log_of_requests, bundle_dir, device="cpu", work=tmp_path / "work")
    assert run_job(job).passed
    about = json.loads((tmp_path / "work" / "shard-0-of-1" / "work.json").read_text())
    assert about["shard"] == [0, 1]
    assert run_job(job).passed
    with pytest.raises(DataError, match="shuffle_seed None, now 3"):
        run_job(replace(job, schedule=Schedule(shuffle_seed=3)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bundle": None}, "exactly one of them"),
        ({"target": "localhost:1"}, "exactly one of them"),
        ({"snapshots": (SnapshotFile("request", Path("x.parquet"), "who"),)}, "x.parquet: cannot be read as a snapshot"),
    ],
)
def test_wrong_jobs_are_refused(log_of_requests: Path, bundle_dir: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        run_job(replace(ReplayJob(log_of_requests, bundle_dir, device="cpu"), **change))


def test_a_user_snapshot_needs_a_key_that_the_request_has(log_of_requests: Path, bundle_dir: Path, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"uid": ["u1"], "hour": [1]}), tmp_path / "users.parquet")
    job = ReplayJob(log_of_requests, bundle_dir, device="cpu", snapshots=(SnapshotFile("request", tmp_path / "users.parquet", "uid"),))
    with pytest.raises(DataError, match="key 'uid' is no request-level feature"):
        run_job(job)
