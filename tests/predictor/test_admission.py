"""The queue: order, bounds, deadlines, and who is told what."""

import threading
import time
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DeadlineError, OverloadError
from ninerank.predictor.admission import AdmissionQueue, Job
from ninerank.predictor.call import HIGH, LOW, NORMAL, Call
from ninerank.predictor.servicetime import STALE_NS, ServiceTime

MS = 1_000_000


class Asked:
    """A job and what became of it."""

    def __init__(self, priority: int = NORMAL, left_ms: float | None = None, rows: int = 10) -> None:
        now_ns = time.perf_counter_ns()
        self.outcome: list[Any] = []
        self.is_gone = False
        call = Call(now_ns, None if left_ms is None else now_ns + int(left_ms * MS), priority=priority)
        self.job = Job(call, rows, nothing(), lambda answer, error: self.outcome.append(error or answer), lambda: self.is_gone)


def nothing() -> Generator[None, None, bytes]:
    yield
    return b""


def measured(queue: AdmissionQueue, ms: float, rows: int = 10) -> None:
    """Let the queue see how long a job of `rows` rows takes."""
    asked = Asked(rows=rows)
    queue.offer(asked.job)
    assert queue.take(wait=False) is asked.job
    queue.done(asked.job, int(ms * MS))


@given(st.lists(st.sampled_from([HIGH, NORMAL, LOW]), max_size=20))
def test_order_is_by_priority_then_by_arrival(priorities: list[int]) -> None:
    queue = AdmissionQueue(100)
    jobs = [Asked(priority).job for priority in priorities]
    for job in jobs:
        queue.offer(job)
    assert queue.stats().waiting == len(jobs)
    taken = [queue.take(wait=False) for _ in jobs]
    assert taken == sorted(jobs, key=lambda job: job.call.priority)  # stable: equals stay in order
    assert queue.take(wait=False) is None
    assert (queue.stats().waiting, queue.stats().running) == (0, len(jobs))


def test_what_is_beyond_the_bound_is_refused_with_a_time() -> None:
    queue = AdmissionQueue(2)
    measured(queue, 30)
    running, waiting = Asked(), Asked()
    queue.offer(running.job)
    assert queue.take(wait=False) is running.job
    queue.offer(waiting.job)
    with pytest.raises(OverloadError, match="1 requests wait and no more are taken in; try again in 30 ms") as refused:
        queue.offer(Asked().job)
    assert refused.value.retry_after_ms == 30
    queue.done(running.job, 1)
    queue.offer(Asked().job)
    assert queue.stats().refused == 1


def test_a_higher_priority_takes_the_place_of_the_youngest_of_the_lowest() -> None:
    queue = AdmissionQueue(3)
    old, young, normal, high = Asked(LOW), Asked(LOW), Asked(NORMAL), Asked(HIGH)
    for asked in (old, young, normal):
        queue.offer(asked.job)
    queue.offer(high.job)
    assert isinstance(young.outcome[0], OverloadError)
    assert [queue.take(wait=False) for _ in range(3)] == [high.job, normal.job, old.job]
    for _ in range(3):
        queue.done(high.job, 1)
    for _ in range(3):
        queue.offer(Asked(NORMAL).job)
    with pytest.raises(OverloadError):
        queue.offer(Asked(NORMAL).job)
    assert queue.stats().displaced == 1


def test_what_cannot_be_answered_in_time_is_refused_when_it_comes() -> None:
    queue = AdmissionQueue(100)
    measured(queue, 20)
    for _ in range(4):
        queue.offer(Asked().job)
    with pytest.raises(OverloadError, match=r"4 requests wait, which takes about 80\.0 ms; the request has (49|50)\.\d ms"):
        queue.offer(Asked(left_ms=50).job)
    queue.offer(Asked(HIGH, left_ms=50).job)  # goes before those that wait
    queue.offer(Asked(left_ms=500).job)


def test_what_waited_too_long_is_dropped_before_it_is_computed() -> None:
    queue = AdmissionQueue(100)
    measured(queue, 200)
    passed, short, gone, fine = Asked(left_ms=-1), Asked(left_ms=100), Asked(), Asked(left_ms=60_000)
    gone.is_gone = True
    for asked in (passed, short, gone, fine):
        queue._append(asked.job)  # as if they had been offered in time
    assert queue.take(wait=False) is fine.job
    assert "the deadline passed" in str(passed.outcome[0])
    assert "and computing takes about 200.0 ms" in str(short.outcome[0])
    assert all(isinstance(asked.outcome[0], DeadlineError) for asked in (passed, short))
    assert gone.outcome == [None]
    assert queue.stats().late == 2


def test_a_job_that_asks_for_another_turn_goes_behind_its_peers() -> None:
    queue = AdmissionQueue(10)
    large, small = Asked(rows=5_000), Asked()
    queue.offer(large.job)
    queue.offer(small.job)
    assert queue.take(wait=False) is large.job
    queue.again(large.job)
    assert [queue.take(wait=False) for _ in range(2)] == [small.job, large.job]


def test_those_who_wait_are_woken_by_a_job_and_by_the_end() -> None:
    queue = AdmissionQueue(10)
    taken: list[Job | None] = []
    threads = [threading.Thread(target=lambda: taken.append(queue.take(wait=True))) for _ in range(2)]
    for thread in threads:
        thread.start()
    job = Asked().job
    queue.offer(job)
    queue.close()
    for thread in threads:
        thread.join(30)
    assert sorted(taken, key=lambda one: one is None) == [job, None]


def test_service_time_follows_rows_and_forgets() -> None:
    service = ServiceTime()
    assert service.expected_ns(100, 0) == 0
    for step in range(200):
        rows = 100 + step % 7 * 50
        service.observe(rows, 500_000 + 3_000 * rows, step)
    assert abs(service.expected_ns(1_000, 200) - 3_500_000) < 10_000
    assert service.expected_ns(0, 200) >= 0
    for step in range(200):  # the machine became twice as slow
        rows = 100 + step % 7 * 50
        service.observe(rows, 1_000_000 + 6_000 * rows, step)
    assert abs(service.expected_ns(1_000, 200) - 7_000_000) < 100_000
    assert service.expected_ns(1_000, 200 + 2 * STALE_NS) == 0
    service.observe(100, 777, 3 * STALE_NS)
    assert service.expected_ns(5_000, 3 * STALE_NS) == 777


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10**10)), min_size=1, max_size=30), st.integers(0, 2**32))
def test_an_estimate_is_never_negative(seen: list[tuple[int, int]], rows: int) -> None:
    service = ServiceTime()
    for seen_rows, elapsed_ns in seen:
        service.observe(seen_rows, elapsed_ns, 0)
    assert service.expected_ns(rows, 0) >= 0
