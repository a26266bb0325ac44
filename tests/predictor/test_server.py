"""The server over real gRPC: right scores for right requests, the right refusal for wrong ones, and it goes on."""

import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import DataError, DeadlineError, DeviceError, NinerankError, OverloadError, RequestError
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.cache.entities import default_item_key
from ninerank.predictor.client import PredictorClient, build_request
from ninerank.predictor.requestlog import read_log
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.predictor.wire import encode_column
from ninerank.proto.v1 import predictor_pb2 as pb
from ninerank.towers.config import parse_model
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import build_model

Rows = Callable[..., pa.RecordBatch]
USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS = [{"item_id": "i1", "price": 1.5, "tags": ["t1"], "city": "rome"}, {"item_id": "i2", "price": None, "tags": [], "city": "oslo"}]


ROLES = (("u", "user"), ("i", "item"))


class Served:
    """A running server and the ways to talk to it."""

    def __init__(self, bundle_dir: Path, **config: Any) -> None:
        self.server = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", **config))
        self.ports = self.server.start()
        self.target = f"127.0.0.1:{self.ports.port}"
        self.channel = grpc.insecure_channel(self.target)

    def call(self, data: bytes, timeout_s: float = 30.0) -> bytes:
        """Rank with bytes that need not be a message."""
        answer: bytes = self.channel.unary_unary("/ninerank.v1.Predictor/Rank")(data, timeout=timeout_s)
        return answer

    def still_serves(self) -> None:
        assert len(pb.RankResponse.FromString(self.call(build_request(USER, ITEMS).SerializeToString())).scores) == 2

    def stop(self) -> None:
        self.channel.close()
        self.server.stop(0)


@pytest.fixture(scope="module")
def items_file(log_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = log_rows(40, seed=77).select(["tags", "price", "city"])
    file = tmp_path_factory.mktemp("items") / "items.parquet"
    pq.write_table(pa.Table.from_batches([rows]).append_column("item_id", pa.array([f"i{n}" for n in range(40)])), file)
    return file


@pytest.fixture(scope="module")
def served(bundle_dir: Path, items_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    own = Served(bundle_dir, metrics_port=0, items=items_file, log_dir=tmp_path_factory.mktemp("log"), max_candidates=500)
    yield own
    own.stop()


@pytest.fixture
def client(served: Served) -> Iterator[PredictorClient]:
    with PredictorClient(served.target) as own:
        yield own


@pytest.fixture
def start(bundle_dir: Path) -> Iterator[Callable[..., Served]]:
    """Starts servers of the test's own."""
    running: list[Served] = []

    def begin(bundle_dir: Path = bundle_dir, **config: Any) -> Served:
        running.append(Served(bundle_dir, **config))
        return running[-1]

    yield begin
    for own in running:
        own.stop()


def split(rows: pa.RecordBatch, served: Served) -> tuple[dict[str, Any], dict[str, pa.Array]]:
    schema = served.server.engine.schema
    user = rows.select(schema.request.names).slice(0, 1).to_pylist()[0]
    return user, {name: rows.column(name) for name in schema.item.names}


@pytest.mark.parametrize("count", [1, 2, 300])
def test_served_scores_are_those_of_the_trained_model(
    served: Served, client: PredictorClient, model: RankingModel, spec: FeatureSpec, log_rows: Rows, count: int
) -> None:
    rows = log_rows(count, seed=count)
    user, items = split(rows, served)
    result = client.rank(user, items)
    schema = served.server.engine.schema
    joined = schema.joined(schema.rank_input(rows.select(schema.request.names).slice(0, 1), rows.select(schema.item.names)))
    with torch.inference_mode():
        wanted = torch.sigmoid(model(Transform(spec).batch(joined, labels=False))).numpy()[:, 0]
    assert np.abs(result.scores - wanted).max() <= 1e-6
    assert np.abs(result.scores - served.server.engine.score(joined)[:, 0]).max() <= 1e-6
    assert result.order.tolist() == np.argsort(-result.scores, kind="stable").tolist()
    assert (result.model_name, result.model_version) == ("small", "7")
    assert not result.tasks
    times = result.timings_us
    assert times["total"] >= times["transform"] + times["lookup"] + times["compute"] > 0


def test_a_model_of_two_tasks_gives_both(start: Callable[..., Served], tmp_path: Path) -> None:
    features = [{"name": name, "kind": "id", "role": role, "encoding": {"kind": "hashed", "num_buckets": 9}} for name, role in ROLES]
    spec = FeatureSpec.parse({"labels": ["click", "buy"], "features": features}, "spec")
    model = build_model(parse_model({"name": "lr"}), spec, EmbeddingConfig(init_std=1.0), seed=1)
    rows = pa.record_batch({"u": ["a"] * 4, "i": ["x", "y", "z", None]})
    export_bundle(model, spec, rows, tmp_path / "two", model_name="two", version="1")
    own = start(bundle_dir=tmp_path / "two", log_dir=tmp_path / "log")
    wanted = own.server.engine.score(rows)
    with PredictorClient(own.target) as client:
        result = client.rank({"u": "a"}, {"i": ["x", "y", "z", None]})
    assert list(result.tasks) == ["click", "buy"]
    assert np.abs(np.stack([result.tasks["click"], result.tasks["buy"]], 1) - wanted).max() <= 1e-6
    assert np.array_equal(result.scores, result.tasks["click"])
    assert result.order.tolist() == np.argsort(-wanted[:, 0], kind="stable").tolist()
    own.server.stop()
    (logged,) = read_log(tmp_path / "log")
    assert np.array_equal(own.server.engine.rank(logged.input).scores_NT, logged.scores_NT)


def test_top_k_bounds_the_order_alone(client: PredictorClient) -> None:
    result = client.rank(USER, ITEMS, top_k=1)
    assert (len(result.scores), result.order.tolist()) == (2, [int(result.scores.argmax())])
    assert len(client.rank(USER, ITEMS, top_k=99).order) == 2


def test_ids_are_looked_up_and_unknown_ones_flagged(client: PredictorClient, items_file: Path) -> None:
    stored = pq.read_table(items_file).to_pylist()
    by_id = client.rank(USER, ids=["i3", "nobody", "i5"])
    inline = client.rank(USER, [stored[3], {"item_id": "nobody"}, stored[5]])
    assert np.array_equal(by_id.scores, inline.scores)
    assert by_id.defaults_used.unknown_candidates == (1,)
    assert inline.defaults_used.unknown_candidates == ()


def test_features_sent_along_win_over_the_cache(client: PredictorClient, items_file: Path) -> None:
    stored = pq.read_table(items_file).to_pylist()
    mixed = client.rank(USER, {"price": [9.0, 8.0]}, ids=["i3", "i4"])
    inline = client.rank(USER, [{**stored[3], "price": 9.0}, {**stored[4], "price": 8.0}])
    assert np.array_equal(mixed.scores, inline.scores)
    everything = client.rank(USER, ITEMS, ids=["who", "cares"])
    assert np.array_equal(everything.scores, client.rank(USER, ITEMS).scores)
    assert not everything.defaults_used


def test_without_a_cache_ids_are_the_item_ids(start: Callable[..., Served]) -> None:
    own = start()
    with PredictorClient(own.target) as client:
        by_id = client.rank(USER, {"price": [1.0, 2.0]}, ids=["i1", "i2"])
        inline = client.rank(USER, {"price": [1.0, 2.0], "item_id": ["i1", "i2"]})
    assert np.array_equal(by_id.scores, inline.scores)
    assert by_id.defaults_used.item_columns == ("tags", "city")


def test_the_column_of_ids_is_guessed_with_care(spec: FeatureSpec) -> None:
    def of(*names: str, sequence: str | None = None) -> str | None:
        hashed = {"kind": "hashed", "num_buckets": 9}
        features = [{"name": name, "kind": "id", "role": "item", "encoding": hashed} for name in names]
        features += [{"name": "past", "kind": "sequence", "role": "user", "of": sequence}] if sequence else []
        return default_item_key(FeatureSpec.parse({"labels": ["y"], "features": features}, "spec"))

    assert default_item_key(spec) == "item_id"
    assert of("C1", "C2") is None
    assert of("brand", "item") == "item"
    assert of("item_id", "video", sequence="video") == "video"


def test_the_column_of_ids_may_be_said(start: Callable[..., Served], bundle_dir: Path, items_file: Path, tmp_path: Path) -> None:
    own = start(item_key="city")
    with PredictorClient(own.target) as client:
        by_id = client.rank(USER, {"price": [1.0, 2.0]}, ids=["oslo", "rome"])
        inline = client.rank(USER, {"price": [1.0, 2.0], "city": ["oslo", "rome"]})
    assert np.array_equal(by_id.scores, inline.scores)
    with pytest.raises(DataError, match="item key 'cities' is no item column; did you mean 'city'"):
        PredictorServer(bundle_dir, ServeConfig(device="cpu", item_key="cities"))
    with pytest.raises(DataError, match="key column 'sku' is missing"):
        PredictorServer(bundle_dir, ServeConfig(device="cpu", item_key="sku", items=items_file))


def test_defaults_are_flagged(client: PredictorClient) -> None:
    result = client.rank({"user_id": "u1"}, {"price": [1.0]})
    assert result.defaults_used.user_columns == ("age", "hour", "history")
    assert result.defaults_used.item_columns == ("item_id", "tags", "city")
    assert bool(result.defaults_used)
    assert not client.rank(USER, ITEMS).defaults_used


def test_request_ids_are_echoed_or_made(client: PredictorClient) -> None:
    assert client.rank(USER, ITEMS, request_id="mine-1").request_id == "mine-1"
    made = {client.rank(USER, ITEMS).request_id for _ in range(3)}
    assert len(made) == 3
    assert client.rank(USER, ITEMS, model_name="small", model_version="7").model_version == "7"


def request(**changes: Any) -> pb.RankRequest:
    message = build_request(USER, ITEMS)
    for name, value in changes.items():
        if isinstance(value, list):
            message.ClearField(name)
            getattr(message, name).extend(value)
        elif isinstance(value, pb.Column):
            getattr(message, name).CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


def column(name: str, values: Any) -> pb.Column:
    return encode_column(name, pa.array(values))


INVALID = grpc.StatusCode.INVALID_ARGUMENT
BAD = {
    "no message": (b"\xff\xff\xff", INVALID, "is no ninerank.v1.RankRequest"),
    "empty": (b"", INVALID, "1 to 500 candidates, this one has 0"),
    "zero candidates": (request(num_candidates=0), INVALID, "this one has 0"),
    "too many candidates": (request(num_candidates=501), INVALID, "1 to 500 candidates, this one has 501"),
    "absurdly many candidates": (request(num_candidates=2**32 - 1), INVALID, "this one has 4294967295"),
    "unknown user feature": (request(user=[column("usr_id", ["u"])]), INVALID, "did you mean 'user_id'"),
    "unknown item feature": (request(item_features=[column("pryce", [1.0, 2.0])]), INVALID, "did you mean 'price'"),
    "a very long name": (request(item_features=[column("x" * 100_000, [1.0, 2.0])]), INVALID, "unknown item feature 'xxx"),
    "names of another alphabet": (request(item_features=[column("价格\n" * 5_000, [1.0, 2.0])]), INVALID, "unknown item feature '价"),
    "very many columns": (request(item_features=[pb.Column()] * 200_000), INVALID, "unknown item feature ''"),
    "item feature of the user": (request(user=[column("price", [1.0])]), INVALID, "'price' is an item feature"),
    "two user rows": (request(user=[column("user_id", ["u", "v"])]), INVALID, "column 'user_id'"),
    "ragged candidates": (
        request(item_features=[column("price", [1.0, 2.0]), column("item_id", ["a"])]),
        INVALID,
        "column 'item_id': string_values.offsets has 8 bytes",
    ),
    "feature twice": (request(item_features=[column("price", [1.0, 2.0])] * 2), INVALID, "'price' is sent twice"),
    "nan": (request(item_features=[column("price", [1.0, float("nan")])]), INVALID, "'price', row 1: nan"),
    "infinity": (request(user=[column("age", [float("-inf")])]), INVALID, "'age', row 0: -inf"),
    "wrong type": (request(item_features=[column("price", ["cheap", "dear"])]), INVALID, "'price' is of type string"),
    "list for one": (request(item_features=[column("price", [[1.0], [2.0]])]), INVALID, "'price' is of type list"),
    "one for list": (request(item_features=[column("tags", ["a", "b"])]), INVALID, "'tags' is of type string"),
    "no values": (request(item_features=[pb.Column(name="price")]), INVALID, "holds no values"),
    "nothing to rank": (request(item_features=[]), INVALID, "neither candidate_ids nor item_features"),
    "too few ids": (request(candidate_ids=column("", ["a"])), INVALID, "string_values.offsets"),
    "lists of ids": (request(candidate_ids=column("", [["a"], ["b"]])), INVALID, "one id a candidate"),
    "bad request id": (request(request_id="a b"), INVALID, "printable ASCII"),
    "long request id": (request(request_id="a" * 129), INVALID, "1 to 128"),
    "unknown model": (request(model_name="large"), grpc.StatusCode.NOT_FOUND, "served: small"),
    "unknown version": (request(model_version="8"), grpc.StatusCode.NOT_FOUND, "served: 7"),
}


@pytest.mark.parametrize("what", BAD)
def test_wrong_requests_are_refused_and_the_server_goes_on(served: Served, what: str) -> None:
    message, status, text = BAD[what]
    with pytest.raises(grpc.RpcError) as refusal:
        served.call(message if isinstance(message, bytes) else message.SerializeToString())
    assert refusal.value.code() is status
    assert text in refusal.value.details()
    request_id = dict(refusal.value.trailing_metadata())["ninerank-request-id"]
    assert refusal.value.details().endswith(f"(request {request_id})")
    served.still_serves()


def test_messages_beyond_the_limit_are_refused_and_counted(start: Callable[..., Served]) -> None:
    own = start(max_message_bytes=20_000)
    with pytest.raises(grpc.RpcError) as refusal:
        own.call(b"x" * 30_000)
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the message has 30,000 bytes, 20,000 are allowed" in str(refusal.value.details())
    with PredictorClient(own.target) as client:
        # The server's own refusal, and that of gRPC, which the server never hears of.
        for candidates in (3_000, 50_000):
            with pytest.raises(
                OverloadError, match=r"^the message has [\d,]+ bytes, [\d,]+ are allowed: .*`ninerank serve --max-message-mb`"
            ):
                client.rank(USER, {"price": np.zeros(candidates)})
    said = r"bytes, 10,000 are allowed: .*PredictorClient\(max_message_bytes=\.\.\.\) raises what this client sends"
    with PredictorClient(own.target, max_message_bytes=10_000) as client, pytest.raises(OverloadError, match=said):
        client.rank(USER, {"price": np.zeros(3_000)})
    own.still_serves()
    registry = own.server.telemetry.registry
    assert registry.get_sample_value("ninerank_requests_total", {"status": "RESOURCE_EXHAUSTED"}) == 2
    assert registry.get_sample_value("ninerank_requests_total", {"status": "OK"}) == 1
    assert registry.get_sample_value("ninerank_calls_total") == 4


class SlowEngine:
    """Holds `Engine.rank` until told to go on, and counts how often it was reached."""

    def __init__(self, own: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on, self.calls = threading.Semaphore(0), threading.Event(), 0
        rank = own.server.engine.rank

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.reached.release()
            assert self.go_on.wait(60)
            return rank(*args, **kwargs)

        monkeypatch.setattr(own.server.engine, "rank", slow)


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `function`; the call that comes back waits for its value or raises its error."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            outcome.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()

    def wait() -> Any:
        thread.join(60)
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return wait


def test_what_cannot_make_its_deadline_is_not_computed(start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    own = start(workers=1)
    slow = SlowEngine(own, monkeypatch)
    with PredictorClient(own.target) as client:
        first = in_thread(lambda: client.rank(USER, ITEMS))
        assert slow.reached.acquire(timeout=60)
        # One waits behind the first with the call's own deadline, one with the field of the message.
        late = in_thread(lambda: client.rank(USER, ITEMS, timeout_ms=100))
        field = in_thread(lambda: own.call(request(timeout_ms=50).SerializeToString()))
        with pytest.raises(DeadlineError):
            late()
        time.sleep(0.1)
        slow.go_on.set()
        assert len(first().scores) == 2
        with pytest.raises(grpc.RpcError) as refusal:
            field()
        assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the deadline passed" in refusal.value.details()
        assert slow.calls == 1
    own.still_serves()


def test_calls_that_were_cancelled_are_not_computed(start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    own = start(workers=1)
    slow = SlowEngine(own, monkeypatch)
    first = in_thread(own.still_serves)
    assert slow.reached.acquire(timeout=60)
    waiting = own.channel.unary_unary("/ninerank.v1.Predictor/Rank").future(request().SerializeToString(), timeout=60)
    time.sleep(0.3)
    waiting.cancel()
    time.sleep(0.3)
    slow.go_on.set()
    first()
    own.still_serves()
    assert slow.calls == 2


def test_more_than_may_wait_is_refused(start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    own = start(workers=1, max_pending=3)
    slow = SlowEngine(own, monkeypatch)
    with PredictorClient(own.target) as client:
        waiting = [in_thread(lambda: client.rank(USER, ITEMS)) for _ in range(10)]
        assert slow.reached.acquire(timeout=60)
        time.sleep(0.5)
        slow.go_on.set()
        outcomes = []
        for wait in waiting:
            try:
                outcomes.append(len(wait().scores))
            except OverloadError:
                outcomes.append(0)
        assert 3 <= outcomes.count(2) <= 4
        assert outcomes.count(0) == 10 - outcomes.count(2)
    own.still_serves()


def test_a_fault_of_the_server_tells_the_request_id_alone(
    start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = start()
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise ValueError("a secret of the house")

        patch.setattr(own.server.engine, "rank", fail)
        with caplog.at_level(logging.ERROR, logger="ninerank"), pytest.raises(grpc.RpcError) as refusal:
            own.call(request(request_id="mine").SerializeToString())
    assert refusal.value.code() is grpc.StatusCode.INTERNAL
    assert refusal.value.details() == "internal error (request mine)"
    assert "request mine failed" in caplog.text
    assert "a secret of the house" in caplog.text
    own.still_serves()


def test_clients_at_once_get_their_own_scores(served: Served, log_rows: Rows) -> None:
    requests = [split(log_rows(20 + n, seed=n), served) for n in range(8)]
    with PredictorClient(served.target) as one:
        wanted = [one.rank(*asked).scores for asked in requests]

    def work(n: int) -> int:
        right = 0
        with PredictorClient(served.target) as own:
            for step in range(20):
                m = (n + step) % len(requests)
                right += np.array_equal(own.rank(*requests[m], timeout_ms=60_000).scores, wanted[m])
        return right

    waits = [in_thread(lambda n=n: work(n)) for n in range(8)]
    assert [wait() for wait in waits] == [20] * 8


def test_the_end_lets_requests_under_way_finish(start: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = start(workers=1, log_dir=tmp_path / "log")
    slow = SlowEngine(own, monkeypatch)
    with PredictorClient(own.target) as client, PredictorClient(own.target) as late:
        under_way = in_thread(lambda: client.rank(USER, ITEMS, request_id="under-way", timeout_ms=60_000))
        assert slow.reached.acquire(timeout=60)
        stopping = in_thread(own.server.stop)
        time.sleep(0.2)
        with pytest.raises(NinerankError, match="no server answers at"):
            late.rank(USER, ITEMS, timeout_ms=2_000)
        slow.go_on.set()
        assert len(under_way().scores) == 2
        stopping()
    assert [logged.request_id for logged in read_log(tmp_path / "log")] == ["under-way"]


def test_health_and_reflection_tell_what_is_served(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", "ninerank.v1.Predictor"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    (answer,) = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"ninerank.v1.Predictor", "grpc.health.v1.Health"} <= names


def test_metrics_count_what_happened(start: Callable[..., Served], items_file: Path, tmp_path: Path) -> None:
    own = start(metrics_port=0, items=items_file, log_dir=tmp_path)
    with PredictorClient(own.target) as client:
        client.rank(USER, ids=["i1", "i2", "nobody"])
        client.rank({"user_id": "u"}, ITEMS)
        with pytest.raises(RequestError):
            client.rank(USER, {"nothing": [1]})
    with urllib.request.urlopen(f"http://127.0.0.1:{own.ports.metrics_port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    for line in (
        'ninerank_requests_total{status="OK"} 2.0',
        'ninerank_requests_total{status="INVALID_ARGUMENT"} 1.0',
        'ninerank_stage_seconds_count{stage="compute"} 2.0',
        "ninerank_candidates_sum 5.0",
        'ninerank_defaulted_columns_total{column="age"} 1.0',
        "ninerank_unknown_candidates_total 1.0",
        'ninerank_cache_entities{entity="item"} 40.0',
        'ninerank_cache_hits_total{entity="item"} 2.0',
        'ninerank_cache_misses_total{entity="item"} 1.0',
        "ninerank_log_dropped_total 0.0",
    ):
        assert line in lines
    assert any(line.startswith("ninerank_model_info{") and 'version="7"' in line for line in lines)


def test_logged_requests_get_exactly_their_scores_again(
    start: Callable[..., Served], items_file: Path, log_rows: Rows, tmp_path: Path
) -> None:
    own = start(items=items_file, log_dir=tmp_path)
    results = {}
    with PredictorClient(own.target) as client:
        for n in range(10):
            results[f"inline-{n}"] = client.rank(*split(log_rows(3 + n, seed=n), own), request_id=f"inline-{n}")
        results["ids"] = client.rank(USER, {"price": [4.0, 5.0, 6.0]}, ids=["i1", "nobody", "i7"], request_id="ids")
    item_key = own.server.caches.items.key
    own.server.stop()
    logged = {request.request_id: request for request in read_log(tmp_path)}
    assert logged.keys() == results.keys()
    for request_id, request in logged.items():
        again = own.server.engine.rank(request.input).scores_NT
        assert np.array_equal(again, request.scores_NT)
        assert np.array_equal(again[:, 0], results[request_id].scores)
    assert logged["ids"].candidate_ids.to_pylist() == ["i1", "nobody", "i7"]
    inline = logged["inline-0"]
    assert inline.candidate_ids.to_pylist() == inline.input.items.column(item_key).to_pylist()


def test_a_port_in_use_is_named(served: Served, bundle_dir: Path) -> None:
    with pytest.raises(DeviceError, match=f"cannot listen on 127.0.0.1:{served.ports.port}"):
        PredictorServer(bundle_dir, ServeConfig(port=served.ports.port, device="cpu")).start()
    with pytest.raises(DeviceError, match=f"metrics port {served.ports.metrics_port}"):
        PredictorServer(bundle_dir, ServeConfig(port=0, metrics_port=served.ports.metrics_port, device="cpu")).start()


def test_the_answer_is_a_message_that_older_clients_read(served: Served) -> None:
    answer = served.call(request().SerializeToString())
    with pytest.raises(DecodeError):
        pb.RankResponse.FromString(answer[:-1])
    assert pb.RankResponse.FromString(answer + b"\xd2\x02\x01x").model_version == "7"  # a field of tomorrow


def test_the_log_tells_defaults_unknown_candidates_times_and_propensities(
    start: Callable[..., Served], items_file: Path, tmp_path: Path
) -> None:
    own = start(items=items_file, log_dir=tmp_path)
    with PredictorClient(own.target) as client:
        client.rank({"user_id": "u1"}, ids=["i1", "nobody"], request_id="seen", propensities=[0.25, 0.75])
        for wrong, said in (([0.5], "propensities holds 1 numbers"), ([0.5, 0.0], "0 of candidate 1"), ([float("nan"), 1], "nan of cand")):
            with pytest.raises(RequestError, match=said):
                client.rank({"user_id": "u1"}, ids=["i1", "i2"], propensities=wrong)
    own.stop()
    (logged,) = read_log(tmp_path)
    assert logged.propensity_N is not None
    assert logged.propensity_N.tolist() == [0.25, 0.75]
    assert logged.unknown == (1,)
    assert set(logged.defaulted) == {"age", "hour", "history"}
    assert logged.times_us.keys() >= {"queue", "cache", "transform", "compute", "total"}
