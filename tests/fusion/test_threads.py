"""Shares run on several threads, from several callers, and pass on what goes wrong."""

import os
import threading

import pytest
import torch

from ninerank.fusion.kernels import threads


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
