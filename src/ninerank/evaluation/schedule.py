"""When and in which order logged requests are sent again, and how many at once."""

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config
from ninerank.evaluation.replayer import Answer, Replayer

if TYPE_CHECKING:
    from ninerank.predictor.requestlog import LoggedRequest

__all__ = ["Schedule", "answered", "paced", "shuffled"]

T = TypeVar("T")


class Schedule(Config):
    """rate: requests a second. speed: as they were logged, this many times as fast. Neither: as fast as it goes.

    shuffle_seed: in an order drawn from it (within a window of 10,000 requests) and not in that of the log. concurrency: requests under
    way at once.
    """

    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    speed: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    shuffle_seed: int | None = Field(default=None, ge=0)
    concurrency: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.rate is not None and self.speed is not None:
            raise ValueError("rate and speed are both given; a replay has one pace")
        if self.speed is not None and self.shuffle_seed is not None:
            raise ValueError("speed keeps the pace of the log, which shuffled requests have not; give a rate")
        return self


def shuffled(items: Iterable[T], seed: int, window: int = 10_000) -> Iterator[T]:
    """The items in an order drawn from `seed`, none more than about `window` places early.

    >>> list(shuffled(range(6), seed=1))
    [1, 4, 0, 5, 3, 2]
    """
    draw, waiting = random.Random(seed), []
    for item in items:
        waiting.append(item)
        if len(waiting) > window:
            yield _pop(waiting, draw)
    while waiting:
        yield _pop(waiting, draw)


def _pop(waiting: list[T], draw: random.Random) -> T:
    place = draw.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


def paced(requests: Iterable["LoggedRequest"], schedule: Schedule) -> Iterator["LoggedRequest"]:
    """The requests in the schedule's order, each when it is due; one that is late is not waited for, and does not delay those after it."""
    ordered = requests if schedule.shuffle_seed is None else shuffled(requests, schedule.shuffle_seed)
    started, first_us = time.monotonic(), None
    for number, request in enumerate(ordered):
        if first_us is None:
            first_us = request.time_us
        if schedule.rate is not None or schedule.speed is not None:
            after_s = number / schedule.rate if schedule.rate else (request.time_us - first_us) * 1e-6 / (schedule.speed or 1.0)
            time.sleep(max(0.0, started + after_s - time.monotonic()))
        yield request


def answered(requests: Iterable["LoggedRequest"], replayer: Replayer, concurrency: int = 1) -> Iterator[tuple["LoggedRequest", Answer]]:
    """Each request with its new answer, in the order of the requests; at most `concurrency` are under way."""
    if concurrency == 1:
        for request in requests:
            yield request, replayer.rank(request)
        return
    waiting: deque[tuple[LoggedRequest, Future[Answer]]] = deque()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="replay") as pool:
        try:
            for request in requests:
                waiting.append((request, pool.submit(replayer.rank, request)))
                while len(waiting) >= concurrency or (waiting and waiting[0][1].done()):
                    first, future = waiting.popleft()
                    yield first, future.result()
            for request, future in waiting:
                yield request, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
