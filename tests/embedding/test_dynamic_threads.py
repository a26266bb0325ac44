"""Readers beside a trainer: what they get is always the row of the id they asked for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ninerank.embedding.dynamic import Capacity, DynamicTable, DynamicTableConfig, initial_values
from ninerank.embedding.dynamic.lock import SharedLock


def test_readers_beside_a_trainer_that_grows_and_evicts() -> None:
    config = DynamicTableConfig(eviction=(Capacity(max_rows=20_000, fill=0.5),), reserve_rows=1 << 20)
    table = DynamicTable("t", {"deep": 2}, config, seed=0)
    kept = torch.arange(500) << 40
    values = initial_values(kept.numpy(), 2, seed=0, group="deep", table="t", std=0.01)
    table.lookup(kept, train=True, step=0)
    table.finish_step(0)
    stop = threading.Event()

    def read() -> int:
        times = 0
        while not stop.is_set():
            rows = table.lookup(kept, train=False)  # the trainer sees these ids in every step, so that they stay
            assert (rows != 0).all()
            assert (table.values("deep")[rows].numpy() == values).all()
            times += 1
        return times

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for step in range(1, 60):
                news = torch.arange(step * 2000, step * 2000 + 2000)
                table.lookup(torch.cat([kept, news]), train=True, step=step)
                table.finish_step(step)
        finally:
            stop.set()
        assert sum(reader.result(timeout=60) for reader in readers) > 0
    assert table.statistics().evicted > 0


def test_readers_get_the_same_answers_in_parallel() -> None:
    table = DynamicTable("t", {"deep": 1}, DynamicTableConfig(reserve_rows=1 << 18), seed=0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100_000))
    rows = table.lookup(ids, train=True, step=0)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: table.lookup(ids, train=False), range(16)):
            assert torch.equal(answer, rows)
    figures = table.statistics()
    assert (figures.lookups, figures.hits) == (17 * 100_000, 16 * 100_000)


def test_shared_lock_lets_readers_together_and_writers_alone() -> None:
    lock, inside, together = SharedLock(), 0, threading.Barrier(2, timeout=30)
    seen: list[int] = []

    def write() -> None:
        nonlocal inside
        with lock.writing():
            inside += 1
            time.sleep(0.001)
            seen.append(inside)
            inside -= 1

    def read() -> None:
        with lock.reading():
            together.wait()  # passes only if both readers are inside
            seen.append(inside + 1)

    for _ in range(5):
        threads = [threading.Thread(target=target) for target in (read, read, write, write)]
        for thread in threads[:2]:
            thread.start()
        for thread in threads[:2]:
            thread.join(30)
        for thread in threads[2:]:
            thread.start()
        for thread in threads[2:]:
            thread.join(30)
    assert seen == [1] * 20


def test_shared_lock_is_free_again_after_an_error() -> None:
    lock = SharedLock()
    for side in (lock.reading, lock.writing):
        with pytest.raises(ValueError, match="x"), side():
            raise ValueError("x")
    with lock.writing():
        pass


def test_a_waiting_writer_goes_before_new_readers() -> None:
    lock, order = SharedLock(), []
    first_in, first_out = threading.Event(), threading.Event()

    def first() -> None:
        with lock.reading():
            first_in.set()
            first_out.wait(30)

    def writer() -> None:
        with lock.writing():
            order.append("writer")

    def late() -> None:
        with lock.reading():
            order.append("late reader")

    threads = [threading.Thread(target=first), threading.Thread(target=writer), threading.Thread(target=late)]
    threads[0].start()
    first_in.wait(30)
    threads[1].start()
    while not lock._writers_in_line:
        time.sleep(0.001)
    threads[2].start()
    time.sleep(0.02)
    assert order == []
    first_out.set()
    for thread in threads:
        thread.join(30)
    assert order == ["writer", "late reader"]
