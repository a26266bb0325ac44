"""Plans as values, and TorchRec's planner behind them; no process beside this one."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from rich.console import Console

from ninerank.embedding import dynamic
from ninerank.embedding.dynamic import Capacity, eviction, storage
from ninerank.embedding.sharding import capacity, make_plan
from ninerank.embedding.sharding.blocks import RowBlocks
from ninerank.embedding.sharding.config import ShardingConfig
from ninerank.embedding.sharding.plan import Machine, Placed, Plan
from ninerank.embedding.sharding.tables import ShardTable, check_sharding, shard_tables, tables_apart
from ninerank.errors import DataError, DeviceError, SpecError
from ninerank.features.spec import FeatureSpec, IdFeature

GROUPS = {"deep": 16, "linear": 1}
ROW_BYTES = {"deep": 128, "linear": 8}
TABLES = (
    ShardTable("user", 100_000, ("user",), (1.0,), is_pooled=True),
    ShardTable("item", 50_001, ("item", "history"), (1.0, 20.0), is_pooled=False),
    ShardTable("city", 3, ("city",), (1.0,), is_pooled=True),
)


def planned(machine: Machine = Machine("cpu", 4, 4, 1 << 30), **config: object) -> Plan:  # noqa: B008 - it is frozen
    pytest.importorskip("torchrec", reason="needs torchrec")
    return make_plan(TABLES, GROUPS, ShardingConfig.parse(config, "sharding"), machine, batch_size=256, row_bytes=ROW_BYTES)


def printed(plan: Plan) -> str:
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as found:
        console.print(plan.tables())
    return found.get()


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_blocks_of_all_processes_make_the_table(kind):
    placed = Placed("item", "deep", 10, 6, kind, 1 if kind == "table_wise" else None, 48)
    cells = [(row, column) for rank in range(3) for row in placed.block(rank, 3).rows for column in placed.block(rank, 3).columns]
    assert sorted(cells) == [(row, column) for row in range(10) for column in range(6)]
    assert sum(placed.bytes_of(rank, 3) for rank in range(3)) == 480


def test_fewer_rows_than_processes_leave_some_without():
    placed = Placed("city", "deep", 2, 4, "row_wise", None, 32)
    assert [len(placed.block(rank, 4).rows) for rank in range(4)] == [1, 1, 0, 0]
    assert placed.block(3, 4).is_empty


def test_kinds_asked_for_are_kept_and_one_column_stays_whole():
    plan = planned(default="table_wise", tables={"item": "row_wise", "user": "column_wise", "city": "data_parallel"})
    kinds = {(placed.table, placed.group): placed.kind for placed in plan.placed}
    assert kinds["item", "deep"] == kinds["item", "linear"] == "row_wise"
    assert (kinds["user", "deep"], kinds["user", "linear"]) == ("column_wise", "table_wise")
    assert kinds["city", "deep"] == "data_parallel"
    text = printed(plan)
    assert "all, 12,501 rows each" in text
    assert "all, 4 columns each" in text
    assert "all, a copy each" in text


def test_a_plan_is_the_same_each_time_and_travels_as_json():
    plan = planned()
    assert planned() == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert len(plan.placed) == 6
    assert len(plan.predicted_ms) == 4
    assert sum(plan.bytes_of(rank) for rank in range(4)) >= 150_004 * 136


def test_many_processes_are_printed_by_the_least_and_the_most_loaded():
    text = printed(planned(Machine("cpu", 32, 8, 1 << 30), default="table_wise"))
    assert text.count("%") <= 6


def test_memory_decides():
    one_table = 100_000 * 128
    kinds = {placed.table: placed.kind for placed in planned(Machine("cpu", 4, 4, one_table // 2)).placed if placed.group == "deep"}
    assert kinds["user"] in {"row_wise", "column_wise"}  # no process can hold it whole
    with pytest.raises(DeviceError, match=r"no plan for 20,400,544 bytes .* over 2 processes of 1,000,000 bytes each"):
        planned(Machine("cpu", 2, 2, 1_000_000))


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_plans_for_accelerators_need_none(kind):
    plan = planned(Machine(kind, 8, 8, 1 << 34))
    assert len(plan.predicted_ms) == 8


def test_a_device_for_which_fbgemm_has_no_operators_is_refused():
    pytest.importorskip("torchrec", reason="needs torchrec")
    from ninerank.embedding.sharding.torchrec import check_operators

    check_operators("cpu")
    with pytest.raises(DeviceError, match=r"sharded tables on npu: fbgemm has no permute_2D_sparse_data.*RecSDK"):
        check_operators("npu")


def test_dynamic_tables_lie_by_id_and_are_not_placed():
    spec = FeatureSpec(labels=("click",), features=(IdFeature(name="item", role="item", dtype="int64", encoding={"kind": "dynamic"}),))
    check_sharding(spec, {"deep": 9}, ShardingConfig(default="column_wise", tables={"item": "auto"}), 2)
    with pytest.raises(SpecError, match="item = row_wise, but it is a dynamic table: its rows always lie by id"):
        check_sharding(spec, GROUPS, ShardingConfig(tables={"item": "row_wise"}), 2)
    assert shard_tables(spec, ShardingConfig()) == ()
    apart = tables_apart(spec, GROUPS, ROW_BYTES)
    plan = make_plan((), GROUPS, ShardingConfig(), Machine("cpu", 2, 2, 1 << 20), batch_size=8, row_bytes=ROW_BYTES, apart=apart)
    assert [(each.group, each.dim, each.row_bytes) for each in plan.apart] == [("deep", 16, 128), ("linear", 1, 8)]
    assert Plan.from_json(plan.to_json()) == plan
    assert re.search(r"item +│ deep +│ +grows │ +16 │ +128 B a row │ by_id │ all, by a hash of the id", printed(plan))


@pytest.mark.parametrize("by", ["lru", "lfu"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_beyond_a_capacity_is_found_over_all_processes(monkeypatch, by, world_size):
    """Processes as threads that meet in every sum."""
    draw = np.random.default_rng(5)
    book = np.zeros(400, storage.BOOK)
    book["id"] = draw.permutation(400) * (2**54) - 2**61
    book["last_seen"], book["count"] = draw.integers(0, 7, 400), draw.integers(0, 5, 400)  # many ties, some free rows
    owner = dynamic.shard_of(book["id"].copy(), world_size)
    wanted = book["id"][eviction.chosen(Capacity(max_rows=200, by=by, fill=0.9), book, 9, eviction.Alone())]
    meeting, said = threading.Barrier(world_size), [0] * world_size
    place = threading.local()

    def total(value: torch.Tensor) -> torch.Tensor:
        said[place.rank] = int(value)
        meeting.wait(30)
        found = torch.tensor(sum(said))
        meeting.wait(30)
        return found

    def of(rank: int) -> list[int]:
        place.rank = rank
        own = book[owner == rank]
        return own["id"][eviction.chosen(Capacity(max_rows=200, by=by, fill=0.9), own, 9, capacity.Everyone())].tolist()

    monkeypatch.setattr(capacity, "global_sum", total)
    with ThreadPoolExecutor(world_size) as threads:
        parts = list(threads.map(of, range(world_size)))
    assert sorted(own for part in parts for own in part) == sorted(wanted.tolist())
    assert len(wanted) == (book["count"] > 0).sum() - 180


def test_tiered_tables_are_cut_into_rows():
    features = (IdFeature(name="item", role="item", encoding={"kind": "hashed", "num_buckets": 9}),)
    spec = FeatureSpec(labels=("click",), features=features)
    check_sharding(spec, {"deep": 9}, ShardingConfig(default="column_wise", tables={"item": "row_wise"}), 2, {"item": None})
    with pytest.raises(SpecError, match="item = table_wise, but it is a tiered table: it is always cut into blocks of rows"):
        check_sharding(spec, GROUPS, ShardingConfig(tables={"item": "table_wise"}), 2, {"item": None})
    with pytest.raises(SpecError, match="table 'item' has 10 rows, too few for 6 processes"):
        check_sharding(spec, GROUPS, ShardingConfig(), 6, {"item": None})
    assert shard_tables(spec, ShardingConfig(), {"item": None}) == ()
    apart = tables_apart(spec, GROUPS, ROW_BYTES, {"item": None})
    assert re.search(r"item +│ deep +│ +10 │ +16 │ +0.00 │ tiered │ all, 5 rows each, on the host", printed(Plan(2, (), apart=apart)))
    with pytest.raises(DataError, match=r"table 'item': id 10 is outside its 10 rows \(valid: 0 to 9\)"):
        RowBlocks("item", 10, 2).owner_of(np.array([3, 10]))
