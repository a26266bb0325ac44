"""Choice of rows to give up, against sorting, and through the table."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ninerank.embedding.dynamic import Capacity, DynamicTable, DynamicTableConfig, FusedRule, LastSeen, LeastFrequent
from ninerank.embedding.dynamic.eviction import EvictionConfig, smallest
from ninerank.fusion.kernels.embedding_update import RowwiseAdagrad


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40), st.integers(-1, 45))
def test_smallest_is_the_head_of_a_sort(entries: list[tuple[int, int]], count: int) -> None:
    rows = [(*entry, place) for place, entry in enumerate(entries)]  # the last key is distinct, as ids are
    keys = [np.array([row[k] for row in rows], np.int64) for k in range(3)]
    assert sorted(smallest(count, *keys).tolist()) == sorted(row[2] for row in sorted(rows)[: max(count, 0)])


def table_of(*policies: EvictionConfig, **settings: object) -> DynamicTable:
    config = {"eviction": [policy.model_dump() for policy in policies], "reserve_rows": 64, **settings}
    return DynamicTable("t", {"deep": 2}, DynamicTableConfig.parse(config, "test"), seed=0)


def see(table: DynamicTable, step: int, *ids: int, now: float | None = None) -> int:
    table.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=step, now=now)
    return table.finish_step(step, now)


def ids_of(table: DynamicTable) -> list[int]:
    return table.state()["id"].tolist()


def test_last_seen_by_steps() -> None:
    table = table_of(LastSeen(max_age=2), evict_every=1)
    assert [see(table, 0, 1, 2), see(table, 1, 2), see(table, 2, 3)] == [0, 0, 0]
    assert see(table, 3, 3) == 1  # 1 was seen 3 steps ago
    assert ids_of(table) == [2, 3]
    assert see(table, 4, 2) == 0
    assert ids_of(table) == [2, 3]


def test_last_seen_by_seconds() -> None:
    table = table_of(LastSeen(max_age=3600), clock="seconds", evict_every=1)
    see(table, 0, 1, now=1.7e9)
    see(table, 1, 2, now=1.7e9 + 3600.9)
    assert ids_of(table) == [1, 2]
    see(table, 2, 2, now=1.7e9 + 3601)
    assert ids_of(table) == [2]


def test_checks_for_age_run_every_so_many_steps() -> None:
    table = table_of(LastSeen(max_age=0), evict_every=5)
    for step in range(1, 5):
        assert see(table, step, step) == 0
    assert see(table, 5, 5) == 4
    assert ids_of(table) == [5]


def test_evict_every_zero_leaves_it_to_the_caller() -> None:
    table = table_of(LastSeen(max_age=0), evict_every=0)
    for step in range(4):
        assert see(table, step, step) == 0
    assert table.evict() == 3
    assert table.evict() == 0


def test_least_frequent_spares_the_recent() -> None:
    table = table_of(LeastFrequent(min_count=3, max_age=1), evict_every=1)
    see(table, 0, 1, 1, 1, 2, 2)
    see(table, 1, 3)
    see(table, 2, 4)
    assert ids_of(table) == [1, 3, 4]
    see(table, 3, 5)
    assert ids_of(table) == [1, 4, 5]


@pytest.mark.parametrize(("by", "left"), [("lru", [1, 6, 7, 8]), ("lfu", [1, 2, 7, 8])])
def test_capacity(by: str, left: list[int]) -> None:
    """Seen last at step 0: 1 2 3 4, counts 3 2 1 1; at step 1: 5 6; at step 2: 1 7 8 twice each."""
    table = table_of(Capacity.parse({"max_rows": 6, "by": by, "fill": 0.7}, "test"), evict_every=0)
    assert see(table, 0, 1, 2, 2, 3, 4) == 0
    assert see(table, 1, 5, 6) == 0
    assert see(table, 2, 1, 7, 7, 8, 8) == 4
    assert ids_of(table) == left


def test_ties_go_to_the_smaller_id_wherever_the_rows_lie() -> None:
    for order in ([5, 3, 9, -4, 7, 0], [0, 7, 9, 5, -4, 3]):
        table = table_of(Capacity(max_rows=4, by="lfu", fill=1.0))
        assert see(table, 0, *order) == 2
        assert ids_of(table) == [3, 5, 7, 9]


def test_capacity_is_kept_after_every_step_and_passed_only_within_one() -> None:
    table = table_of(Capacity(max_rows=10, fill=0.5))
    table.lookup(torch.arange(100), train=True, step=0)
    assert len(table) == 100
    assert table.finish_step(0) == 95
    assert len(table) == 5


def test_nothing_is_given_up_in_the_middle_of_a_step() -> None:
    table = table_of(Capacity(max_rows=1, fill=1.0), LastSeen(max_age=0), evict_every=1)
    rows = table.lookup(torch.tensor([1, 2, 3]), train=True, step=4)
    for attempt in (table.evict, lambda: table.evict(LastSeen(max_age=0)), lambda: table.remove(torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="middle of step 4"):
            attempt()
    assert table.lookup(torch.tensor([1, 2, 3]), train=False).tolist() == rows.tolist()
    table.lookup(torch.tensor([9]), train=True, step=5)  # the next step's lookup came ahead
    assert table.finish_step(4) == 0
    assert table.finish_step(5) == 3
    assert ids_of(table) == [9]


def test_a_step_does_not_end_with_gradients_left() -> None:
    """Their rows might belong to other ids when they are applied."""
    rule = FusedRule(RowwiseAdagrad(), 0.05)
    table = DynamicTable("t", {"deep": 2}, DynamicTableConfig(reserve_rows=8), seed=0, rule=rule)
    for settle in (table.update, table.zero_grad):
        rows = table.lookup(torch.tensor([1]), train=True, step=0)
        table.rows("deep", rows).sum().backward()
        with pytest.raises(RuntimeError, match="step 0 ends with gradients left"):
            table.finish_step(0)
        settle()
        table.finish_step(0)


def test_rows_are_used_again_and_start_afresh() -> None:
    table = table_of(Capacity(max_rows=4, fill=1.0))
    see(table, 0, 1, 2, 3, 4)
    first = table.state()
    with torch.no_grad():
        table.values("deep")[1:] = 9.0
    see(table, 1, 5, 6, 7, 8)
    assert ids_of(table) == [5, 6, 7, 8]
    see(table, 2, 1, 2, 3, 4)
    assert ids_of(table) == [1, 2, 3, 4]
    assert torch.equal(table.state()["value.deep"], first["value.deep"])
    assert table.storage.used <= 9
    assert table.state()["count"].tolist() == [1, 1, 1, 1]


def test_policies_act_in_order() -> None:
    table = table_of(LastSeen(max_age=0), Capacity(max_rows=2, fill=1.0), evict_every=1)
    see(table, 1, 1, 2, 3)
    assert ids_of(table) == [2, 3]
    see(table, 2, 4)
    assert ids_of(table) == [4]


def test_remove_by_id() -> None:
    table = table_of()
    see(table, 0, 1, 2, 3)
    assert table.remove(torch.tensor([3, 3, 77, 1])) == 2
    assert ids_of(table) == [2]
    assert table.statistics().evicted == 2
