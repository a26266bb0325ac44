import threading
import time

import pytest

from ninerank.training.prefetch import Prefetch


def worker_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ninerank-prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 7])
def test_order_is_kept(depth):
    with Prefetch(iter(range(50)), depth) as items:
        assert list(items) == list(range(50))
    assert not worker_threads()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_after_the_items_before_it(depth):
    def source():
        yield 1
        yield 2
        raise ValueError("row 3 is bad")

    seen = []
    with pytest.raises(ValueError, match="row 3 is bad"), Prefetch(source(), depth) as items:
        seen.extend(items)
    assert not worker_threads()
    with Prefetch(source(), depth) as items:
        assert [next(items), next(items)] == [1, 2]


def test_leaving_early_stops_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            number = 0
            while True:
                number += 1
                yield number
        finally:
            closed.set()

    with Prefetch(source(), 2) as items:
        assert next(items) == 1
    assert closed.is_set()
    assert not worker_threads()


def test_no_more_than_depth_items_are_made_ahead():
    made = []

    def source():
        for number in range(20):
            made.append(number)
            yield number

    with Prefetch(source(), 3) as items:
        next(items)
        deadline_s = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three waiting, one in the producer's hand
