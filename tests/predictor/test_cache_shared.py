"""The shared table: several processes read and write it, none sees half a row, and one that dies in the middle harms nobody."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ninerank.errors import DataError
from ninerank.predictor.cache import slots
from ninerank.predictor.cache.shared import FOREVER, Ids, SharedTable
from ninerank.predictor.cache.value import RowFormat

FORMAT = RowFormat(pa.schema({"n": pa.int64(), "again": pa.int64(), "text": pa.string()}))
LEAST_BYTES = 60_000
# Whoever reads sees the same number three times, or the row was torn.
CHILD = """
import random, sys, time
import numpy as np, pyarrow as pa
from ninerank.predictor.cache.shared import Ids, SharedTable
from ninerank.predictor.cache.value import RowFormat
form = RowFormat(pa.schema({"n": pa.int64(), "again": pa.int64(), "text": pa.string()}))
table = SharedTable.attach(form, sys.argv[1])
form.encode(pa.record_batch({"n": [0], "again": [0], "text": [""]}), 0)
form.decode(table.find(Ids(pa.array([0])), 0).values)  # compiled from here on
print("attached", flush=True)
rng, end, seen = random.Random(int(sys.argv[3])), time.monotonic() + float(sys.argv[4]), 0
if sys.argv[2] == "always":
    n = np.array([rng.randrange(1 << 40) for _ in range(5000)])
    ids = Ids(pa.array(n % 200))
    values = form.encode(pa.record_batch({"n": n, "again": n, "text": [str(k) * (k % 40 + 1) for k in n]}), 0)
while time.monotonic() < end:
    if sys.argv[2] == "always":
        table.put(ids, values)
    elif sys.argv[2] == "write":
        n = np.array([rng.randrange(1 << 40) for _ in range(16)])
        rows = pa.record_batch({"n": n, "again": n, "text": [str(k) * rng.randrange(1, 40) for k in n]})
        table.put(Ids(pa.array([rng.randrange(200) for _ in n])), form.encode(rows, 0))
    else:
        found = table.find(Ids(pa.array(range(200))), 0)
        columns = form.decode(found.values)
        for n, again, text in zip(*(column.to_pylist() for column in columns.values())):
            assert n == again and (n is None) == (text is None), (n, again, text)
            assert n is None or text == str(n) * (len(text) // len(str(n))), (n, text)
            seen += n is not None
print("seen", seen, flush=True)
"""


def child(table: SharedTable, what: str, seed: int, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, table.path, what, str(seed), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n", process.communicate()
    return process


def put(table: SharedTable, ids: list[int], n: int, repeat: int = 1) -> np.ndarray:
    rows = pa.record_batch({"n": [n] * len(ids), "again": [n] * len(ids), "text": [str(n) * repeat] * len(ids)})
    return table.put(Ids(pa.array(ids)), FORMAT.encode(rows, 0))


def held(table: SharedTable, ids: list[int]) -> list[int | None]:
    columns = FORMAT.decode(table.find(Ids(pa.array(ids, pa.int64())), 0).values)
    return columns["n"].to_pylist()


@pytest.mark.distributed
def test_processes_share_rows_and_none_is_torn() -> None:
    table = SharedTable(FORMAT, LEAST_BYTES)
    put(table, [0], 1)
    children = [child(table, what, seed, 2.0) for seed, what in enumerate(("write", "write", "read"))]
    told = [process.communicate(timeout=60) for process in children]
    assert [process.returncode for process in children] == [0, 0, 0], told
    assert int(told[2][0].split()[1]) > 200
    entries, num_bytes, evictions = table.figures()
    assert entries == sum(n is not None for n in held(table, list(range(200))))
    assert num_bytes <= LEAST_BYTES
    assert evictions > 100


@pytest.mark.distributed
def test_a_writer_killed_at_any_moment_costs_its_row_at_most() -> None:
    table = SharedTable(FORMAT, LEAST_BYTES)
    put(table, list(range(1000, 1020)), 7)
    rng, dirty = random.Random(1), 0
    for seed in range(5):
        process = child(table, "always", seed, 60.0)
        evictions = table.figures()[2]
        while table.figures()[2] < evictions + 10_000:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGSTOP)
        dirty += int(table._words[slots.DIRTY // 8])
        process.kill()
        process.communicate()
        assert put(table, [5, 6], 40 + seed).tolist() == [slots.STORED] * 2
        assert held(table, [5, 6]) == [40 + seed] * 2
        ids = [*range(200), *range(1000, 1020)]
        columns = FORMAT.decode(table.find(Ids(pa.array(ids)), 0).values)
        assert columns["n"].equals(columns["again"])
        assert table.figures()[0] == len(ids) - columns["n"].null_count
    assert dirty > 0, "no writer was killed while it wrote"


def test_a_table_left_in_disorder_is_put_in_order() -> None:
    table = SharedTable(FORMAT, LEAST_BYTES)
    put(table, list(range(50)), 1, repeat=30)
    put(table, list(range(20)), 2, repeat=90)
    before = held(table, list(range(50)))
    figures = table.figures()
    # What a writer leaves that dies in the middle: bucket numbers odd, the lock's mark set, the heads of lists gone.
    buckets = np.frombuffer(table._memory, np.int64, 2 * int(table._words[slots.NUM_BUCKETS // 8]), slots.BUCKETS_AT)
    buckets[::2] |= 1
    buckets[1::2] = 0
    table._words[slots.DIRTY // 8] = 1
    assert held(table, [3]) == [None]  # the reader that met it repairs it
    assert held(table, list(range(50))) == before
    assert table.figures() == figures
    put(table, [77], 3)
    assert held(table, [77, 3]) == [3, 2]
    table.clear()
    assert held(table, [77, 3]) == [None, None]
    assert table.figures()[:2] == (0, 0)


def test_a_fork_uses_the_table_of_its_parent() -> None:
    table = SharedTable(FORMAT, LEAST_BYTES)
    with table._writing(0):  # the thread that holds the lock is not there in the child
        pid = os.fork() if threading.active_count() == 1 else None
        if pid == 0:
            time.sleep(0.3)
            os._exit(0 if put(table, [1], 5).tolist() == [slots.STORED] else 1)
        time.sleep(0.1)
    if pid is None:
        pytest.skip("other tests' threads run in this process")
    assert os.waitpid(pid, 0)[1] == 0
    assert held(table, [1]) == [5]


def test_memory_that_is_no_such_table_is_refused(tmp_path: Path) -> None:
    table = SharedTable(FORMAT, LEAST_BYTES)
    with pytest.raises(DataError, match="holds other features than m"):
        SharedTable.attach(RowFormat(pa.schema({"m": pa.int64()})), table.path)
    put(table, [1], 5)
    (tmp_path / "file").write_bytes(b"no table")
    with pytest.raises(DataError, match="is no feature cache"):
        SharedTable.attach(FORMAT, str(tmp_path / "file"))
    path = table.path
    second = SharedTable.attach(FORMAT, path)
    table.close()
    assert held(second, [1]) == [5]
    second.close()
    assert put(second, [1], 6).tolist() == [slots.OVERTAKEN]
    with pytest.raises(DataError, match="cannot be shared"):
        SharedTable.attach(FORMAT, path)


def test_tables_leave_no_descriptor_behind() -> None:
    gc.collect()  # what other tests left for the collector is not counted
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    for n in range(20):
        table = SharedTable(FORMAT, LEAST_BYTES)
        put(table, [1], n)
        if n % 2:
            table.close()
        del table
    gc.collect()
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208


class Model(RuleBasedStateMachine):
    """A table against a dictionary: what is there is what was put last; nothing else is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SharedTable(FORMAT, LEAST_BYTES)
        self.model: dict[int, int] = {}
        self.step = 0

    @rule(ids=st.lists(st.integers(0, 300), min_size=1, max_size=60), repeat=st.sampled_from([1, 5, 60, 400]))
    def put(self, ids: list[int], repeat: int) -> None:
        self.step += 1
        result = put(self.table, ids, self.step, repeat)
        assert (result == slots.STORED).all()
        self.model.update(dict.fromkeys(ids, self.step))

    @rule(ids=st.lists(st.integers(0, 300), min_size=1, max_size=5))
    def put_absent(self, ids: list[int]) -> None:
        values = FORMAT.encode(pa.record_batch({"n": [], "again": [], "text": []}, schema=FORMAT.schema), 0)
        none = type(values)(np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64), ())
        self.table.put(Ids(pa.array(ids)), none)
        for n in ids:
            self.model.pop(n, None)

    @rule(ids=st.lists(st.integers(0, 300), min_size=1, max_size=5))
    def invalidate(self, ids: list[int]) -> None:
        self.table.invalidate(Ids(pa.array(ids)))
        status = self.table.find(Ids(pa.array(ids)), 1).status_N
        assert not np.isin(status, [slots.HIT, slots.NEGATIVE]).any()

    @rule()
    def rebuild(self) -> None:
        figures = self.table.figures()
        slots.rebuild(self.table._base)
        assert self.table.figures() == figures

    @invariant()
    def holds_what_was_put(self) -> None:
        got = held(self.table, list(range(301)))
        for n, value in enumerate(got):
            assert value in {None, self.model.get(n)}, n
        statuses = self.table.find(Ids(pa.array(range(301))), 0).status_N
        assert self.table.figures()[0] == np.count_nonzero(statuses != slots.MISS)


Model.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestModel = Model.TestCase


def test_a_value_is_fresh_until_its_time() -> None:
    table = SharedTable(FORMAT, LEAST_BYTES)
    ids = Ids(pa.array([1, 2]))
    rows = FORMAT.encode(pa.record_batch({"n": [1, 2], "again": [1, 2], "text": ["", ""]}), 0)
    table.put(ids, rows, np.array([100, FOREVER]))
    assert table.find(ids, 99).status_N.tolist() == [slots.HIT, slots.HIT]
    assert table.find(ids, 100).status_N.tolist() == [slots.EXPIRED, slots.HIT]
