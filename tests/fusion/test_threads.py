"""Shares run on several threads, from several callers, and pass on what goes wrong."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from numba.core.errors import TypingError

from ninerank.fusion.kernels import threads
from ninerank.fusion.kernels.jit import jit_shares


@jit_shares()
def weigh(share, num_shares, numbers):
    """A share's part of the numbers' sum."""
    total = 0
    for n in range(numbers.size * share // num_shares, numbers.size * (share + 1) // num_shares):
        total += numbers[n]
    return total


def test_results_are_in_the_order_of_shares() -> None:
    assert threads.run(lambda thread, count, base: base + thread * count, 4, 100) == [100, 104, 108, 112]


def test_more_shares_than_cores_finish() -> None:
    count = 4 * (os.cpu_count() or 1)
    assert threads.run(lambda thread, of: thread, count) == list(range(count))


def test_many_callers_at_once() -> None:
    found: list[list[int]] = []
    callers = [threading.Thread(target=lambda: found.append(threads.run(lambda thread, of: thread, 3))) for _ in range(16)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [[0, 1, 2]] * 16


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_a_share_reaches_the_caller(bad: int) -> None:
    def share(thread: int, of: int) -> None:
        if thread == bad:
            raise IndexError("row 7")

    with pytest.raises(IndexError, match="row 7"):
        threads.run(share, 2)


def test_small_work_stays_on_one_thread() -> None:
    assert threads.num_threads_for(1000) == 1
    assert threads.num_threads_for(1 << 40) == torch.get_num_threads()


def test_a_caller_takes_the_shares_of_helpers_that_do_not_come() -> None:
    """Both helpers' time is taken by a share that ends when another caller's work has."""
    may_end, held = threading.Event(), threading.Event()

    def hold(thread: int, of: int) -> int:
        held.set()
        assert may_end.wait(30)
        return thread

    count = (os.cpu_count() or 1) + 1
    busy = threading.Thread(target=lambda: threads.run(hold, count))
    busy.start()
    assert held.wait(30)
    try:
        assert threads.run(lambda thread, of: thread, 3) == [0, 1, 2]
        numbers = np.arange(1000)
        assert threads.run_shares(weigh, 3, 7, numbers).sum() == numbers.sum()
    finally:
        may_end.set()
        busy.join()


@pytest.mark.parametrize(("num_threads", "num_shares"), [(1, 1), (1, 5), (2, 1), (2, 64), (9, 4), (3, 1000)])
def test_compiled_shares_are_each_taken_once(num_threads: int, num_shares: int) -> None:
    numbers = np.arange(5000)
    expected = [part.sum() for part in np.split(numbers, [5000 * share // num_shares for share in range(1, num_shares)])]
    for _ in range(20):
        assert threads.run_shares(weigh, num_threads, num_shares, numbers).tolist() == expected


def test_many_callers_of_compiled_shares() -> None:
    wrong: list[int] = []

    def call(seed: int) -> None:
        numbers = np.random.default_rng(seed).integers(0, 100, 100_000)
        for _ in range(30):
            if threads.run_shares(weigh, 2, 16, numbers).sum() != numbers.sum():
                wrong.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_after_a_long_wait_calls_are_made_alone_for_a_while() -> None:
    patience = threads._Patience()
    asked = []
    for _ in range(3):
        asked.append(patience.asks())
        patience.learn(0.010, 0.009)
        alone = 0
        while not patience.asks():
            alone += 1
        asked.append(alone)
        patience.learn(0.010, 0.009)
        while not patience.asks():
            pass
    assert asked[0] is True
    assert asked[1::2] == [8, 32, 64]
    for _ in range(20):
        patience.learn(0.010, 0.001)
        patience.learn(0.0001, 0.00009)
        assert patience.asks()
    patience.learn(0.010, 0.009)
    assert [patience.asks() for _ in range(9)] == [False] * 8 + [True]


def test_wrong_arguments_of_compiled_shares_reach_the_caller() -> None:
    with pytest.raises(TypingError):
        threads.run_shares(weigh, 2, 4, "no numbers")


def test_arrays_are_let_go_when_the_call_is_over() -> None:
    """Even where no helper came to take its part."""
    numbers = np.arange(100_000)
    before = sys.getrefcount(numbers)
    threads.run_shares(weigh, 2, 8, numbers)
    deadline = time.monotonic() + 30
    while sys.getrefcount(numbers) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sys.getrefcount(numbers) == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or not 2 <= (os.cpu_count() or 1) <= threads.MOST_GUIDED + 1, reason="cores")
def test_helpers_leave_the_core_to_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    for core in sorted(allowed):
        monkeypatch.setattr(threads, "_current_core", lambda core=core: core)
        assert threads.run(lambda thread, of: thread, 3) == [0, 1, 2]
        helpers = [thread for thread in threading.enumerate() if thread.name.startswith("ninerank-kernel")]
        assert helpers
        for helper in helpers:
            assert helper.native_id is not None
            assert os.sched_getaffinity(helper.native_id) == allowed - {core} or allowed == {core}
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_and_the_end_of_the_process() -> None:
    """A child has helpers of its own, and a process ends while its helpers wait, or work for a thread that nobody joins."""
    source = """
import os, threading, time, warnings
from ninerank.fusion.kernels import threads

warnings.simplefilter("ignore")
assert threads.run(lambda thread, of: thread, 3) == [0, 1, 2]
child = os.fork()
if child == 0:
    assert threads.run(lambda thread, of: thread, 3) == [0, 1, 2]
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

def forever():
    while True:
        threads.run(lambda thread, of: thread, 3)

threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
