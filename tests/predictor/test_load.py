"""The load tool: what it counts, that a stall is seen by all who would have come, and what it refuses."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.errors import DataError, NinerankError, RequestError, SpecError
from ninerank.evaluation.loadpage import load_page
from ninerank.predictor.client import build_request
from ninerank.predictor.load import LoadConfig, LoadResult, run_load
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.predictor.workload import Workload, requests_of_bundle, requests_of_file, skewed
from ninerank.proto.v1 import predictor_pb2 as pb

REQUEST = build_request({"age": 1.0}, {"price": [1.0, 2.0]}).SerializeToString()
Answer = Callable[[pb.RankRequest, grpc.ServicerContext], pb.RankResponse]


def right(request: pb.RankRequest, context: grpc.ServicerContext) -> pb.RankResponse:
    return pb.RankResponse(scores=[0.5] * request.num_candidates)


@pytest.fixture
def serving() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that answers as the test says; gives its address."""
    servers = []

    def start(answer: Answer) -> str:
        server = grpc.server(ThreadPoolExecutor(16))
        method = grpc.unary_unary_rpc_method_handler(answer, pb.RankRequest.FromString, pb.RankResponse.SerializeToString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ninerank.v1.Predictor", {"Rank": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(0).wait()


def test_a_closed_loop_keeps_as_many_under_way_as_it_is_told(serving: Callable[[Answer], str]) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def answer(request: pb.RankRequest, context: grpc.ServicerContext) -> pb.RankResponse:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1
        return right(request, context)

    found = run_load(serving(answer), [REQUEST], LoadConfig(concurrency=4, seconds=0.8, warmup_s=0.2))
    assert most == 4
    assert found.statuses == {"OK": found.served}
    assert found.percentile_ms(50) >= 5
    assert found.served > 20
    assert sum(second["served"] for second in found.by_second()) == found.served


def test_an_open_loop_tells_a_stall_as_all_who_would_have_come_saw_it(serving: Callable[[Answer], str]) -> None:
    """The server stops for half a second once: of 2 s at 100/s about 50 requests wait, 250 ms on average."""
    stalled = threading.Event()
    gate = threading.Lock()
    count = 0

    def answer(request: pb.RankRequest, context: grpc.ServicerContext) -> pb.RankResponse:
        nonlocal count
        with gate:
            count += 1
            if count == 60 and not stalled.is_set():
                stalled.set()
                time.sleep(0.5)
        return right(request, context)

    config = LoadConfig(rate=100, evenly=True, seconds=2, warmup_s=0.2, deadline_ms=5000)
    found = run_load(serving(answer), [REQUEST], config)
    assert stalled.is_set()
    assert found.statuses == {"OK": 200}
    assert (found.latency_s > 0.1).sum() >= 30
    assert found.percentile_ms(99) > 300


def test_answers_after_the_deadline_and_failures_are_not_served(serving: Callable[[Answer], str]) -> None:
    turn = 0

    def answer(request: pb.RankRequest, context: grpc.ServicerContext) -> pb.RankResponse:
        nonlocal turn
        turn += 1
        if turn > 1 and turn % 3 == 0:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        if turn > 1 and turn % 3 == 1:
            time.sleep(0.3)
        return right(request, context)

    found = run_load(serving(answer), [REQUEST], LoadConfig(rate=30, evenly=True, seconds=1, warmup_s=0, deadline_ms=150))
    assert found.statuses["RESOURCE_EXHAUSTED"] >= 5
    assert found.statuses["DEADLINE_EXCEEDED"] + found.statuses.get("LATE", 0) >= 5
    assert found.asked == 30
    assert found.latency_s.max() <= 0.15
    assert found.requests_per_s == found.served


def test_wrong_answers_and_silence_are_told_before_anything_is_measured(serving: Callable[[Answer], str]) -> None:
    config = LoadConfig(concurrency=1, seconds=0.1, warmup_s=0)
    with pytest.raises(NinerankError, match="1 scores came back for 2 candidates"):
        run_load(serving(lambda request, context: pb.RankResponse(scores=[0.5])), [REQUEST], config)

    def refuse(request: pb.RankRequest, context: grpc.ServicerContext) -> pb.RankResponse:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        raise AssertionError

    with pytest.raises(NinerankError, match="NOT_FOUND, no such model"):
        run_load(serving(refuse), [REQUEST], config)


@pytest.mark.parametrize("given", [{}, {"rate": 1, "concurrency": 1}, {"rate": 0}, {"rate": 5, "second": 1}])
def test_wrong_settings_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        LoadConfig.parse(given, "bench serve")


def test_skew_follows_zipf() -> None:
    random = np.random.default_rng(0)
    counts = np.sort(np.bincount(skewed(100, 200_000, 1.0, random), minlength=100))[::-1]
    expected = 1 / np.arange(1, 101) / (1 / np.arange(1, 101)).sum() * 200_000
    np.testing.assert_allclose(counts[:20], expected[:20], rtol=0.1)
    flat = np.bincount(skewed(10, 100_000, 0.0, random), minlength=10)
    np.testing.assert_allclose(flat, 10_000, rtol=0.1)
    assert skewed(1, 5, 1.0, random).tolist() == [0] * 5


def test_requests_are_those_that_the_server_takes(bundle_dir: Path, log_rows: Callable[..., pa.RecordBatch], tmp_path: Path) -> None:
    rows = log_rows(40, seed=7).select(["tags", "price", "city"])
    items = tmp_path / "items.parquet"
    pq.write_table(pa.Table.from_batches([rows]).append_column("item_id", pa.array([f"i{n}" for n in range(40)])), items)
    inline = requests_of_bundle(bundle_dir, Workload(num_requests=3, candidates=5))
    by_id = requests_of_bundle(bundle_dir, Workload(num_requests=3, candidates=5, send="ids"), items=items)
    for data in inline:
        asked = pb.RankRequest.FromString(data)
        assert asked.num_candidates == 5
        assert {column.name for column in asked.item_features} == {"item_id", "tags", "price", "city"}
    assert all(pb.RankRequest.FromString(data).HasField("candidate_ids") for data in by_id)
    assert requests_of_bundle(bundle_dir, Workload(num_requests=3, candidates=5)) == inline
    with pytest.raises(DataError, match="item key 'itm' is no item feature"):
        requests_of_bundle(bundle_dir, Workload(send="ids"), item_key="itm")
    with pytest.raises(DataError, match="none.parquet: cannot be read"):
        requests_of_bundle(bundle_dir, Workload(), items=tmp_path / "none.parquet")
    with pytest.raises(RequestError, match="none.json: cannot be read"):
        requests_of_file(tmp_path / "none.json")


def test_the_command_loads_a_real_server_and_draws_what_it_saw(bundle_dir: Path, tmp_path: Path) -> None:
    server = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu"))
    target = f"127.0.0.1:{server.start().port}"
    page, out = tmp_path / "page.html", tmp_path / "found.json"
    arguments = ["bench", "serve", "--target", target, "--bundle", bundle_dir, "--candidates", 8, "--distinct", 5, "--seconds", 2.2]
    try:
        words = [str(word) for word in (*arguments, "--rate", 50, "--warmup", 0.3, "--report", page, "--out", out)]
        result = CliRunner().invoke(build("bench"), words)
    finally:
        server.stop(0)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["statuses"]["OK"] == found["served"] > 50
    assert found["latency_ms"]["p50"] <= found["latency_ms"]["p99"] <= found["latency_ms"]["p100"]
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3
    assert "too few answers" not in text


def test_a_page_without_answers_is_a_page() -> None:
    found = LoadResult(LoadConfig(rate=1), 1.0, {"UNAVAILABLE": 3}, np.empty(0), np.empty(0), 0.0)
    assert load_page("host:1", found).count("too few answers") == 3
    json.dumps(found.as_dict(), allow_nan=False)
