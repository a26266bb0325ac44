"""Bytes as the first version of the wire wrote them: today's server answers them, today's client reads them."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ninerank.predictor.call import Call
from ninerank.predictor.client import PredictorClient, build_request, result_of
from ninerank.predictor.eventloop import on_loop
from ninerank.predictor.routes import _embedded
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.proto.v1 import predictor_pb2 as pb

USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS = [
    {"item_id": "i1", "price": 1.5, "tags": ["t1"], "city": "rome"},
    {"item_id": "i2", "price": None, "tags": [], "city": "oslo"},
]
# Ids and features, top_k 1, timeout_ms 60,000, model small 7, request id golden-1.
REQUEST = bytes.fromhex(
    "0a08676f6c64656e2d311205736d616c6c1a013722190a07757365725f69642a0e0a02753112080000000002000000220f0a03616765220800000000"
    "00803e4022100a04686f75721208070000000000000022290a07686973746f72792a140a0469316932120c0000000002000000040000003208000000"
    "0002000000280232162a140a0469316932120c0000000002000000040000003a1f0a076974656d5f69642a140a0469316932120c0000000002000000"
    "040000003a1c0a0570726963652210000000000000f83f00000000000000003a01013a240a04746167732a0e0a027431120800000000020000003"
    "20c0000000001000000010000003a200a04636974792a180a08726f6d656f736c6f120c000000000400000008000000400148e0d403"
)
# Scores 0.25 and 0.75, order [1], a task, all timings, defaults age and city, candidate 1 unknown.
RESPONSE = bytes.fromhex(
    "0a08676f6c64656e2d311205736d616c6c1a013722080000803e0000403f2a010132110a05636c69636b12080000803e0000403f3a0e080110021803"
    "200428053006381e420e0a036167651204636974791a0101"
)


@pytest.fixture(scope="module")
def server(bundle_dir: Path) -> Iterator[tuple[PredictorServer, str]]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu"))
    yield own, f"127.0.0.1:{own.start().port}"
    own.stop(0)


def test_a_request_of_the_first_version_is_answered(server: tuple[PredictorServer, str]) -> None:
    response = pb.RankResponse.FromString(on_loop(server[0].front.rank(REQUEST, Call(time.perf_counter_ns()))))
    assert (response.request_id, response.model_name, response.model_version) == ("golden-1", "small", "7")
    with PredictorClient(server[1]) as client:
        wanted = client.rank(USER, ITEMS, top_k=1)
    assert np.array_equal(np.array(response.scores, np.float32), wanted.scores)
    assert list(response.order) == wanted.order.tolist()


def test_today_s_client_writes_the_same_bytes_and_reads_the_old_answer() -> None:
    request = build_request(USER, ITEMS, ids=["i1", "i2"], top_k=1)
    request.request_id, request.model_name, request.model_version, request.timeout_ms = "golden-1", "small", "7", 60_000
    assert request.SerializeToString(deterministic=True) == REQUEST
    result = result_of(pb.RankResponse.FromString(RESPONSE))
    assert result.scores.tolist() == [0.25, 0.75]
    assert result.order.tolist() == [1]
    assert result.tasks["click"].tolist() == [0.25, 0.75]
    assert (result.timings_us["total"], result.timings_us["compute"]) == (30, 6)
    defaults = result.defaults_used
    assert (defaults.user_columns, defaults.item_columns, defaults.unknown_candidates) == (("age",), ("city",), (1,))
    assert pb.RankResponse.FromString(RESPONSE).SerializeToString(deterministic=True) == RESPONSE


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300, 20_000])
def test_an_answer_is_put_into_a_stream_as_protobuf_does_it(length: int) -> None:
    response = pb.RankResponse(model_version="x" * length)
    wanted = pb.RankStreamResponse(response=response).SerializeToString()
    assert _embedded(response.SerializeToString()) == wanted
