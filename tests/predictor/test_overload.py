"""Ten times more than the server can do: what it answers, it answers in time, nearly as much as at its best; and then it is well again.

A real server over real gRPC; the engine is made slow (it waits, as for a device), so that the machine has time left for so many
callers. 30 seconds of it are in the slow tests.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from ninerank.predictor.client import build_request
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.proto.v1 import predictor_pb2 as pb

USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS: dict[str, Any] = {"item_id": ["i1", "i2"], "price": [1.5, 2.5], "tags": [["t1"], []], "city": ["rome", "oslo"]}
COMPUTE_S = 0.04
TIMEOUT_S = 0.5
MAX_PENDING = 64


@dataclass
class Outcome:
    """What became of the calls of some time. late: answered after their deadline, by the caller's clock."""

    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)
    retry_after_ms: list[int] = field(default_factory=list)
    late: int = 0

    @property
    def goodput(self) -> float:
        return (self.statuses["OK"] - self.late) / self.seconds


@pytest.fixture
def server(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PredictorServer, str]]:
    own = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", workers=1, max_pending=MAX_PENDING))
    rank = own.engine.rank

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(COMPUTE_S)
        return rank(*args, **kwargs)

    monkeypatch.setattr(own.engine, "rank", slow)
    yield own, f"127.0.0.1:{own.start().port}"
    own.stop(0)


async def offered(target: str, per_s: float, seconds: float) -> Outcome:
    """Calls begun at an even pace, whatever becomes of those before."""
    outcome, data = Outcome(seconds), build_request(USER, ITEMS).SerializeToString()
    async with grpc.aio.insecure_channel(target) as channel:
        rank = channel.unary_unary("/ninerank.v1.Predictor/Rank")

        async def one() -> None:
            begun = time.perf_counter()
            try:
                pb.RankResponse.FromString(await rank(data, timeout=TIMEOUT_S))
                outcome.statuses["OK"] += 1
                outcome.late += time.perf_counter() - begun > TIMEOUT_S
            except grpc.aio.AioRpcError as error:
                outcome.statuses[error.code().name] += 1
                trailing = dict(error.trailing_metadata())
                if "grpc-retry-pushback-ms" in trailing:
                    outcome.retry_after_ms.append(int(trailing["grpc-retry-pushback-ms"]))

        started, tasks = time.perf_counter(), []
        while (passed := time.perf_counter() - started) < seconds:
            due = int(passed * per_s) + 1 - len(tasks)
            tasks += [asyncio.create_task(one()) for _ in range(due)]
            await asyncio.sleep(1 / per_s)
        await asyncio.gather(*tasks)
    return outcome


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def overload(server: PredictorServer, target: str, seconds: float) -> None:
    peak = asyncio.run(offered(target, 0.9 / COMPUTE_S, min(seconds, 4)))
    assert peak.statuses.keys() <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    before = resident_bytes()
    busy = asyncio.run(offered(target, 10 / COMPUTE_S, seconds))
    assert busy.goodput >= 0.9 * peak.goodput, (peak, busy)
    assert busy.statuses.keys() <= {"OK", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    refused = busy.statuses["RESOURCE_EXHAUSTED"]
    assert refused > 5 * busy.statuses["OK"]  # it was an overload, and most learnt it at once
    assert len(busy.retry_after_ms) == refused
    assert all(1 <= ms <= 10_000 for ms in busy.retry_after_ms)
    assert resident_bytes() - before < 100 << 20
    stats = server.queue.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    after = asyncio.run(offered(target, 0.5 / COMPUTE_S, 1))
    assert after.statuses == {"OK": after.statuses.total()}
    registry = server.telemetry.registry
    counted = registry.get_sample_value("ninerank_requests_total", {"status": "OK"})
    assert counted is not None
    assert counted >= sum(outcome.statuses["OK"] for outcome in (peak, busy, after))


def test_goodput_stays_under_ten_times_too_much(server: tuple[PredictorServer, str]) -> None:
    overload(*server, seconds=3)


@pytest.mark.slow
def test_goodput_stays_for_half_a_minute(server: tuple[PredictorServer, str]) -> None:
    overload(*server, seconds=30)
