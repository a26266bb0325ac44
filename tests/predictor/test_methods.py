"""Score, RankStream, ModelStatus, tasks and explanations over real gRPC."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest

from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import RequestError
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.client import PredictorClient, build_request
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.predictor.service import PART_ROWS
from ninerank.proto.v1 import predictor_pb2 as pb
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model

Rows = Callable[..., pa.RecordBatch]
USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS = [
    {"item_id": "i1", "price": 1.5, "tags": ["t1"], "city": "rome"},
    {"item_id": "i2", "price": None, "tags": [], "city": "oslo"},
    {"item_id": "i3", "price": 4.0, "tags": ["t2", "t3"], "city": "lima"},
]


@pytest.fixture(scope="module")
def server(bundle_dir: Path) -> Iterator[tuple[PredictorServer, str]]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu"))
    yield own, f"127.0.0.1:{own.start().port}"
    own.stop(0)


@pytest.fixture
def client(server: tuple[PredictorServer, str]) -> Iterator[PredictorClient]:
    with PredictorClient(server[1], timeout_ms=60_000) as own:
        yield own


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictorClient]:
    roles = (("u", "user"), ("i", "item"))
    features = [{"name": name, "kind": "id", "role": role, "encoding": {"kind": "hashed", "num_buckets": 9}} for name, role in roles]
    spec = FeatureSpec.parse({"labels": ["click", "buy"], "features": features}, "spec")
    model = build_model(parse_model({"name": "lr"}), spec, EmbeddingConfig(init_std=1.0), seed=1)
    out = tmp_path_factory.mktemp("two") / "bundle"
    export_bundle(model, spec, pa.record_batch({"u": ["a"] * 4, "i": ["x", "y", "z", None]}), out, model_name="two", version="1")
    own = PredictorServer(out, ServeConfig(port=0, device="cpu"))
    with PredictorClient(f"127.0.0.1:{own.start().port}") as client:
        yield client
    own.stop(0)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_rows_are_scored_as_the_engine_scores_them(
    server: tuple[PredictorServer, str], client: PredictorClient, log_rows: Rows, count: int
) -> None:
    rows = log_rows(count, seed=count).drop_columns(["click"])
    scores = client.score(rows)
    assert list(scores) == ["click"]
    assert np.array_equal(scores["click"], server[0].engine.score(rows)[:, 0])


def test_rows_are_refused_by_name(client: PredictorClient, log_rows: Rows) -> None:
    rows = log_rows(3).drop_columns(["click"])
    for wrong, text in (
        (log_rows(3), "unknown feature 'click'"),
        (rows.set_column(0, "usr_id", rows.column(0)), "unknown feature 'usr_id'; did you mean 'user_id'"),
        (rows.set_column(rows.schema.names.index("price"), "price", pa.array([1.0, float("nan"), 2.0])), "'price'"),
    ):
        with pytest.raises(RequestError, match=text):
            client.score(wrong)
    with pytest.raises(RequestError, match="unknown task 'buy'; valid: click"):
        client.score(rows, tasks=["buy"])
    left_out = client.score(rows.drop_columns(["price"]))
    assert left_out["click"].shape == (3,)


def test_very_large_requests_are_computed_in_parts_with_the_same_scores(
    server: tuple[PredictorServer, str], client: PredictorClient, log_rows: Rows
) -> None:
    rows = log_rows(2 * PART_ROWS + 5, seed=5)
    schema = server[0].engine.schema
    user, items = rows.select(schema.request.names).slice(0, 1), rows.select(schema.item.names)
    result = client.rank(user.to_pylist()[0], {name: items.column(name) for name in schema.item.names}, top_k=9)
    whole = server[0].engine.rank(schema.rank_input(user, items))
    assert np.abs(result.scores - whole.scores_NT[:, 0]).max() <= 1e-6
    assert result.order.tolist() == np.argsort(-result.scores, kind="stable")[:9].tolist()
    assert np.abs(client.score(rows.drop_columns(["click"]))["click"] - server[0].engine.score(rows)[:, 0]).max() <= 1e-6


def test_tasks_are_chosen_and_the_first_one_orders(two_tasks: PredictorClient) -> None:
    items = {"i": ["x", "y", "z", None]}
    both = two_tasks.rank({"u": "a"}, items)
    assert list(both.tasks) == ["click", "buy"]
    buy = two_tasks.rank({"u": "a"}, items, tasks=["buy"], top_k=3)
    assert list(buy.tasks) == ["buy"]
    assert np.array_equal(buy.scores, both.tasks["buy"])
    assert buy.order.tolist() == np.argsort(-both.tasks["buy"], kind="stable")[:3].tolist()
    turned = two_tasks.rank({"u": "a"}, items, tasks=["buy", "click", "buy"])
    assert list(turned.tasks) == ["buy", "click"]
    assert list(two_tasks.score({"u": ["a", "b"], "i": ["x", None]}, tasks=["buy"])) == ["buy"]
    with pytest.raises(RequestError, match="unknown task 'by'; did you mean 'buy'"):
        two_tasks.rank({"u": "a"}, items, tasks=["by"])


def test_explanations_are_scores_with_a_feature_left_out(client: PredictorClient) -> None:
    result = client.rank(USER, ITEMS, top_k=1, explain_top=2)
    assert list(result.explanations) == np.argsort(-result.scores, kind="stable")[:2].tolist()
    for index, contributions in result.explanations.items():
        assert set(contributions) == {*USER, *ITEMS[0]}
        for name, contribution in contributions.items():
            user = {key: value for key, value in USER.items() if key != name}
            items = [{key: value for key, value in item.items() if key != name} for item in ITEMS]
            without = client.rank(user, items).scores[index]
            assert abs(contribution - (result.scores[index] - without)) <= 1e-6, name
    assert not client.rank(USER, ITEMS).explanations
    with pytest.raises(RequestError, match="explain_top is 101, at most 100"):
        client.rank(USER, ITEMS, explain_top=101)


def test_the_status_of_models_names_what_is_served(client: PredictorClient) -> None:
    (model,) = client.models()
    assert (model.name, model.version, model.state, list(model.tasks)) == ("small", "7", pb.ModelVersion.READY, ["click"])
    assert len(model.spec_digest) == 64
    assert model.loaded_at_s > 1.6e9


def test_a_stream_answers_every_request_and_goes_on_after_refusals(server: tuple[PredictorServer, str], client: PredictorClient) -> None:
    wanted = client.rank(USER, ITEMS).scores
    messages = []
    for n in range(200):
        request = build_request(USER, ITEMS)
        request.request_id = f"request-{n}"
        if n % 10 == 3:
            request.model_name = "another"
        messages.append(request.SerializeToString() if n % 10 != 7 else b"\xff no message")
    with grpc.insecure_channel(server[1]) as channel:
        stream = channel.stream_stream("/ninerank.v1.Predictor/RankStream")
        answers = [pb.RankStreamResponse.FromString(data) for data in stream(iter(messages), timeout=60)]
    good = {answer.response.request_id: answer.response for answer in answers if answer.WhichOneof("answer") == "response"}
    assert good.keys() == {f"request-{n}" for n in range(200) if n % 10 not in {3, 7}}
    assert all(np.array_equal(np.array(response.scores, np.float32), wanted) for response in good.values())
    codes = [answer.error.code for answer in answers if answer.WhichOneof("answer") == "error"]
    assert sorted(codes) == [3] * 20 + [5] * 20
    unknown = {answer.error.request_id for answer in answers if answer.error.code == 5}
    assert unknown == {f"request-{n}" for n in range(3, 200, 10)}


def test_a_stream_that_its_client_leaves_ends(server: tuple[PredictorServer, str], client: PredictorClient) -> None:
    def without_end() -> Iterator[bytes]:
        while True:
            yield build_request(USER, ITEMS).SerializeToString()

    with grpc.insecure_channel(server[1]) as channel:
        answers = channel.stream_stream("/ninerank.v1.Predictor/RankStream")(without_end(), timeout=60)
        first: Any = next(iter(answers))
        answers.cancel()
    assert pb.RankStreamResponse.FromString(first).response.model_version == "7"
    assert len(client.rank(USER, ITEMS).scores) == 3
