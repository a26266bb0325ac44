"""The dispatcher: requests that wait are computed at once where that is asked for, and nobody pays for another's fault."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ninerank.errors import NinerankError, RequestError
from ninerank.predictor.call import Call
from ninerank.predictor.client import build_request
from ninerank.predictor.engine import Engine
from ninerank.predictor.eventloop import on_loop
from ninerank.predictor.request import RankInput
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.proto.v1 import predictor_pb2 as pb

Rows = Callable[..., pa.RecordBatch]


@pytest.fixture(params=[0, 1, 2])
def server(request: pytest.FixtureRequest, bundle_dir: Path) -> Iterator[PredictorServer]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", workers=request.param, merge=8))
    own.start()
    yield own
    own.stop(0)


def asked(engine: Engine, rows: pa.RecordBatch) -> tuple[RankInput, bytes]:
    schema = engine.schema
    rank_input = schema.rank_input(rows.select(schema.request.names).slice(0, 1), rows.select(schema.item.names))
    items = {name: rank_input.items.column(name) for name in schema.item.names}
    return rank_input, build_request(rank_input.user.to_pylist()[0], items, top_k=3).SerializeToString()


async def all_at_once(server: PredictorServer, messages: list[bytes]) -> list[Any]:
    calls = (server.front.rank(data, Call(time.perf_counter_ns())) for data in messages)
    return await asyncio.gather(*calls, return_exceptions=True)


def test_requests_that_wait_are_computed_at_once_with_the_scores_of_each_alone(
    server: PredictorServer, log_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [asked(server.engine, log_rows(1 + n % 7, seed=n)) for n in range(40)]
    sizes, many = list[int](), server.engine.rank_many
    held = threading.Event()

    def counted(inputs: Any) -> Any:
        sizes.append(len(inputs))
        return many(inputs)

    def slow(*args: Any, **kwargs: Any) -> Any:
        held.wait(0.2)  # so that some wait behind the first
        return rank(*args, **kwargs)

    rank = server.engine.rank
    wanted = [rank(rank_input, 3) for rank_input, _ in pairs]
    monkeypatch.setattr(server.engine, "rank_many", counted)
    monkeypatch.setattr(server.engine, "rank", slow)
    answers = on_loop(all_at_once(server, [data for _, data in pairs]), 60)
    for answer, output in zip(answers, wanted, strict=True):
        response = pb.RankResponse.FromString(answer)
        assert np.abs(np.array(response.scores, np.float32) - output.scores_NT[:, 0]).max() <= 1e-6
        assert len(response.order) == len(output.order)
    assert max(sizes) <= 8
    assert sum(sizes) > 20  # most of them were


def test_one_bad_request_fails_alone(server: PredictorServer, log_rows: Rows) -> None:
    good = [asked(server.engine, log_rows(3, seed=n))[1] for n in range(12)]
    bad = build_request({}, {"price": [1.0, float("nan")]}).SerializeToString()
    answers = on_loop(all_at_once(server, [*good[:6], bad, *good[6:]]), 60)
    assert [isinstance(answer, NinerankError) for answer in answers] == [False] * 6 + [True] + [False] * 6
    assert isinstance(answers[6], RequestError)
    assert "'price', row 1: nan" in str(answers[6])
    stats = server.queue.stats()
    assert (stats.waiting, stats.running) == (0, 0)


def test_what_is_too_large_is_not_merged(server: PredictorServer, log_rows: Rows) -> None:
    messages = [asked(server.engine, log_rows(count, seed=count))[1] for count in (2_500, 3, 5_000, 2_000, 2_000, 2_000, 2_000, 2_000)]
    answers = on_loop(all_at_once(server, messages), 120)
    assert [len(pb.RankResponse.FromString(answer).scores) for answer in answers] == [2_500, 3, 5_000, *[2_000] * 5]
