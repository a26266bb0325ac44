"""Load on a server: open loop (requests arrive at a rate, whether or not the last one was answered) or closed loop (so many at once).

In an open loop a latency counts from when its request was due and not from when it could be sent: a server that stops for a second delays
everybody who would have come in that second, which a client that waits for answers never sees (coordinated omission). A closed loop
measures how much a server can do, and its latencies are those of clients who wait their turn.

Requests are made beforehand, so that the client costs little of the machine it may share with the server.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config
from ninerank.errors import NinerankError
from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["PERCENTILES", "LoadConfig", "LoadResult", "run_load"]

METHOD = "/ninerank.v1.Predictor/Rank"
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
MAX_UNANSWERED = 20_000


class LoadConfig(Config):
    """rate: requests a second, arriving at random (Poisson) or `evenly`. concurrency: requests under way at once. One of the two is given.

    seconds, warmup_s: measured, and before that not. deadline_ms: of each call; an answer after it does not count as served.
    channels: connections. seed: of arrivals and of which request comes when.
    """

    rate: float | None = Field(default=None, gt=0, le=1e6)
    concurrency: int | None = Field(default=None, ge=1, le=10_000)
    evenly: bool = False
    seconds: float = Field(default=10.0, gt=0, le=86_400)
    warmup_s: float = Field(default=1.0, ge=0, le=3_600)
    deadline_ms: float = Field(default=1_000.0, gt=0, le=600_000)
    channels: int = Field(default=1, ge=1, le=256)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_loop(self) -> Self:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("give one of rate (open loop) and concurrency (closed loop)")
        return self


@dataclass
class LoadResult:
    """What was seen. latency_s: of answers that came in time; sent_s: when each of them was due, from the start of measuring.

    statuses: calls by gRPC status, and "LATE" for answers after the deadline. behind_s: how late the client itself sent at worst: above a
    few milliseconds it, and not the server, was the limit.
    """

    config: LoadConfig
    seconds: float
    statuses: dict[str, int]
    latency_s: npt.NDArray[np.float64]
    sent_s: npt.NDArray[np.float64]
    behind_s: float
    notes: list[str] = field(default_factory=list)

    @property
    def served(self) -> int:
        return len(self.latency_s)

    @property
    def asked(self) -> int:
        return sum(self.statuses.values())

    @property
    def requests_per_s(self) -> float:
        """Answers in time a second: goodput."""
        return self.served / self.seconds

    def percentile_ms(self, percent: float) -> float:
        """Latency in milliseconds that `percent` of the answers do not exceed; nan without answers."""
        return float(np.percentile(self.latency_s, percent, method="higher") * 1e3) if self.served else math.nan

    def by_second(self) -> list[dict[str, float]]:
        """Answers, median and 99th percentile of each second."""
        found = []
        for second in range(math.ceil(self.seconds)):
            own = self.latency_s[(self.sent_s >= second) & (self.sent_s < second + 1)] * 1e3
            p50, p99 = (float(value) for value in np.percentile(own, (50, 99))) if len(own) else (math.nan, math.nan)
            found.append({"second": float(second), "served": float(len(own)), "p50_ms": p50, "p99_ms": p99})
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""

        def number(value: float) -> float | None:
            return round(value, 4) if math.isfinite(value) else None

        return {
            "config": self.config.model_dump(mode="json"),
            "seconds": round(self.seconds, 3),
            "asked": self.asked,
            "served": self.served,
            "requests_per_s": round(self.requests_per_s, 2),
            "statuses": self.statuses,
            "latency_ms": {f"p{percent:g}": number(self.percentile_ms(percent)) for percent in PERCENTILES},
            "mean_ms": number(float(self.latency_s.mean() * 1e3)) if self.served else None,
            "behind_ms": round(self.behind_s * 1e3, 3),
            "by_second": [{name: number(value) for name, value in second.items()} for second in self.by_second()],
            "notes": self.notes,
        }


def run_load(
    target: str,
    requests: Sequence[bytes],
    config: LoadConfig,
    *,
    metadata: Sequence[tuple[str, str]] = (),
    credentials: grpc.ChannelCredentials | None = None,
    on_second: Callable[[int], None] = lambda _: None,
) -> LoadResult:
    """Send serialised RankRequests, drawn anew each time, and measure. Raises NinerankError where the server's first answer is none."""
    return asyncio.run(_Load(target, requests, config, tuple(metadata), credentials, on_second).run())


class _Load:
    def __init__(
        self,
        target: str,
        requests: Sequence[bytes],
        config: LoadConfig,
        metadata: tuple[tuple[str, str], ...],
        credentials: grpc.ChannelCredentials | None,
        on_second: Callable[[int], None],
    ) -> None:
        self._target, self._requests, self._config = target, requests, config
        self._metadata, self._credentials, self._on_second = metadata or None, credentials, on_second
        self._random = np.random.default_rng(config.seed)
        self._statuses: Counter[str] = Counter()
        self._latency: list[float] = []
        self._sent: list[float] = []
        self._behind = 0.0
        self._start = 0.0

    async def run(self) -> LoadResult:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        made = [
            grpc.aio.insecure_channel(self._target, options=options)
            if self._credentials is None
            else grpc.aio.secure_channel(self._target, self._credentials, options=options)
            for _ in range(self._config.channels)
        ]
        try:
            self._calls = [channel.unary_unary(METHOD, None, None) for channel in made]
            await self._check_first_answer()
            config = self._config
            begin = time.perf_counter()
            self._start = begin + config.warmup_s
            self._end = self._start + config.seconds
            ticking = asyncio.create_task(self._tick())
            if config.rate is not None:
                await self._open(begin, config.rate)
            else:
                await asyncio.gather(*(self._client(n) for n in range(config.concurrency or 1)))
            ticking.cancel()
        finally:
            for channel in made:
                await channel.close(None)
        notes = []
        if self._behind > 0.005:
            notes.append(f"the client sent up to {self._behind * 1e3:.1f} ms late: it was a limit too (fewer requests, or another machine)")
        return LoadResult(
            self._config, config.seconds, dict(self._statuses), np.array(self._latency), np.array(self._sent), self._behind, notes
        )

    async def _check_first_answer(self) -> None:
        try:
            data = await self._calls[0](self._requests[0], timeout=30.0, metadata=self._metadata, wait_for_ready=True)
        except grpc.RpcError as error:
            raise NinerankError(f"{self._target}: the first request was not answered: {error.code().name}, {error.details()}") from None
        answer, asked = pb.RankResponse.FromString(data), pb.RankRequest.FromString(self._requests[0])
        if len(answer.scores) != asked.num_candidates:
            raise NinerankError(f"{self._target}: {len(answer.scores)} scores came back for {asked.num_candidates} candidates")

    async def _open(self, begin: float, rate: float) -> None:
        """Start every request when it is due, whatever became of those before."""
        waiting: set[asyncio.Task[None]] = set()
        due, count = begin, 0
        while due < self._end:
            now = time.perf_counter()
            if due > now:
                # A timer wakes up to a millisecond late; what is due then starts at once.
                await asyncio.sleep(due - now)
            if len(waiting) < MAX_UNANSWERED:
                task = asyncio.create_task(self._one(due))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            elif due >= self._start:
                self._statuses["NOT_SENT"] += 1
            count += 1
            due = begin + count / rate if self._config.evenly else due + float(self._random.exponential(1 / rate))
        if waiting:
            await asyncio.wait(waiting)

    async def _client(self, number: int) -> None:
        while (now := time.perf_counter()) < self._end:
            await self._one(now, number)

    async def _one(self, due: float, number: int = 0) -> None:
        sent = time.perf_counter()
        request = self._requests[int(self._random.integers(len(self._requests)))]
        call = self._calls[(number if self._config.concurrency else int(due * 1e6)) % len(self._calls)]
        deadline_s = self._config.deadline_ms * 1e-3
        try:
            # The deadline counts from when the request was due; who comes too late to be sent is late.
            await call(request, timeout=max(1e-3, deadline_s - (sent - due)), metadata=self._metadata)
            status = "OK"
        except grpc.RpcError as error:
            status = error.code().name
        latency = time.perf_counter() - due
        if due < self._start or due >= self._end:
            return
        self._behind = max(self._behind, sent - due)
        if status == "OK" and latency > deadline_s:
            status = "LATE"
        self._statuses[status] += 1
        if status == "OK":
            self._latency.append(latency)
            self._sent.append(due - self._start)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._on_second(1)
