"""The bounded queue before the models: who may wait, who goes next, and who is told at once that it is no use.

Calls of one priority go in the order in which they came. A call is refused when the queue is full (unless one of a lower priority
waits, which then is refused in its place), or when those ahead of it, by the service time measured lately, take longer than it has.
A call whose time does not suffice when its turn comes is dropped before anything is computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

from ninerank.errors import DeadlineError, OverloadError
from ninerank.predictor.call import HIGH, LOW, Call
from ninerank.predictor.engine import Engine
from ninerank.predictor.request import RankInput, RankOutput
from ninerank.predictor.servicetime import ServiceTime

__all__ = ["AdmissionQueue", "Ask", "Job", "QueueStats", "Steps"]


@dataclass(frozen=True)
class Ask:
    """A request that may be computed together with others of the same engine; its output is sent into the generator."""

    engine: Engine
    input: RankInput


# Computes an answer. It yields None where others may have their turn, and an Ask where it waits for an engine's output.
Steps: TypeAlias = Generator[Ask | None, RankOutput | None, bytes]
MIN_RETRY_AFTER_MS = 1
MAX_RETRY_AFTER_MS = 10_000


@dataclass(eq=False)
class Job:
    """One call in the queue. rows: by which its service time is told. finish: hands over bytes or an error, once.

    is_gone: nobody waits for it any more. spent_ns: computing so far.
    """

    call: Call
    rows: int
    steps: Steps
    finish: Callable[[bytes | None, Exception | None], None]
    is_gone: Callable[[], bool]
    expected_ns: int = 0
    spent_ns: int = 0


@dataclass(frozen=True)
class QueueStats:
    """Calls now, and counters since the start. late: dropped since their time ran out; displaced: by a higher priority."""

    waiting: int
    running: int
    capacity: int
    refused: int
    late: int
    displaced: int
    expected_wait_s: float


class AdmissionQueue:
    """Calls that wait for one of `workers`, at most `capacity` of them with those being computed; safe for any thread."""

    def __init__(self, capacity: int, workers: int = 1) -> None:
        self.capacity = capacity
        self._workers = workers
        self._lanes: tuple[deque[Job], ...] = tuple(deque() for _ in range(HIGH, LOW + 1))
        self._expected_ns = [0] * len(self._lanes)
        self._service = ServiceTime()
        self._waiting = self._running = self._refused = self._late = self._displaced = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def offer(self, job: Job) -> None:
        """Let `job` wait; raises OverloadError, with the time after which to try again, where that is no use."""
        call, now_ns = job.call, time.perf_counter_ns()
        with self._changed:
            job.expected_ns = self._service.expected_ns(job.rows, now_ns)
            ahead_ns = self._ahead_ns(call.priority)
            displaced = None
            if self._waiting + self._running >= self.capacity:
                displaced = self._displace(call.priority)
                if displaced is None:
                    self._refused += 1
                    raise self._overload(f"{self._waiting} requests wait and no more are taken in", ahead_ns)
            elif call.deadline_ns is not None and ahead_ns and now_ns + ahead_ns + job.expected_ns > call.deadline_ns:
                self._refused += 1
                left_ms = max(call.deadline_ns - now_ns, 0) / 1e6
                wait = f"{self._waiting} requests wait, which takes about {ahead_ns / 1e6:.1f} ms"
                raise self._overload(f"{wait}; the request has {left_ms:.1f} ms", ahead_ns)
            self._append(job)
            self._changed.notify()
        if displaced is not None:
            displaced.finish(None, self._overload("requests of a higher priority came", ahead_ns))

    def again(self, job: Job) -> None:
        """Put a job that `take` gave back behind those that wait: it had its turn and asks for another."""
        with self._changed:
            self._running -= 1
            self._append(job)
            self._changed.notify()

    def take(self, *, wait: bool) -> Job | None:
        """The job whose turn it is; jobs that came too late are finished on the way. None where none waits, or once closed."""
        while True:
            with self._changed:
                while wait and not self._waiting and not self._is_closed:
                    self._changed.wait()
                if not self._waiting:
                    return None
                job = self._pop()
                late = None if job.is_gone() else self._lateness(job)
                if late is None and not job.is_gone():
                    self._running += 1
                    return job
                self._late += late is not None
            job.finish(None, late)

    def more(self, jobs: int, rows: int) -> list[Job]:
        """At most `jobs` of those that wait now, of at most `rows` rows together, taken as by `take`."""
        taken: list[Job] = []
        while len(taken) < jobs and rows > 0:
            with self._changed:
                lane = next((lane for lane in self._lanes if lane), None)
                if lane is None or lane[0].rows > rows:
                    break
            job = self.take(wait=False)
            if job is None:
                break
            rows -= job.rows
            taken.append(job)
        return taken

    def done(self, job: Job, elapsed_ns: int) -> None:
        """A job that `take` gave is computed, which took `elapsed_ns` in all its turns; 0: it failed, and tells nothing."""
        with self._changed:
            self._running -= 1
            if elapsed_ns:
                self._service.observe(job.rows, elapsed_ns, time.perf_counter_ns())

    def close(self) -> None:
        """Wake those who wait in `take`; what is queued can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def stats(self) -> QueueStats:
        """Counters and sizes at this moment."""
        with self._changed:
            return QueueStats(
                self._waiting,
                self._running,
                self.capacity,
                self._refused,
                self._late,
                self._displaced,
                self._ahead_ns(LOW) / 1e9,
            )

    def _append(self, job: Job) -> None:
        self._lanes[job.call.priority].append(job)
        self._expected_ns[job.call.priority] += job.expected_ns
        self._waiting += 1

    def _pop(self) -> Job:
        lane = next(lane for lane in self._lanes if lane)
        job = lane.popleft()
        self._forget(job)
        return job

    def _forget(self, job: Job) -> None:
        self._expected_ns[job.call.priority] -= job.expected_ns
        self._waiting -= 1

    def _displace(self, priority: int) -> Job | None:
        """The youngest waiting job of the lowest priority, if that is lower than `priority`."""
        for lower in range(LOW, priority, -1):
            if self._lanes[lower]:
                job = self._lanes[lower].pop()
                self._forget(job)
                self._displaced += 1
                return job
        return None

    def _lateness(self, job: Job) -> DeadlineError | None:
        deadline_ns = job.call.deadline_ns
        if deadline_ns is None:
            return None
        now_ns = time.perf_counter_ns()
        left_ns, needed_ns = deadline_ns - now_ns, self._service.expected_ns(job.rows, now_ns)
        if left_ns <= 0:
            return DeadlineError(f"the deadline passed {-left_ns / 1e6:.1f} ms ago, before the request was computed")
        if left_ns < needed_ns:
            return DeadlineError(f"the deadline is in {left_ns / 1e6:.1f} ms and computing takes about {needed_ns / 1e6:.1f} ms")
        return None

    def _ahead_ns(self, priority: int) -> int:
        """How long those that go before a new call of `priority` will take."""
        return sum(self._expected_ns[: priority + 1]) // self._workers

    @staticmethod
    def _overload(why: str, wait_ns: int) -> OverloadError:
        retry_after_ms = min(max(wait_ns // 1_000_000, MIN_RETRY_AFTER_MS), MAX_RETRY_AFTER_MS)
        return OverloadError(f"the server is busy: {why}; try again in {retry_after_ms} ms", retry_after_ms=retry_after_ms)
