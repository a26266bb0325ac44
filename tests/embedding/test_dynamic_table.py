"""The dynamic table against a model made of plain dicts, and against static tables of the same ids."""

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from ninerank.embedding.dynamic import (
    Always,
    BloomCounter,
    Capacity,
    DynamicTable,
    DynamicTableConfig,
    Frequency,
    FusedRule,
    LastSeen,
    Probability,
    initial_values,
    shard_of,
)
from ninerank.embedding.dynamic.admission import AdmissionConfig
from ninerank.errors import DataError, SpecError
from ninerank.fusion.kernels.embedding_update import row_optimizers

SMALLEST, GREATEST = -(2**63), 2**63 - 1
DIMS = {"deep": 3, "linear": 1}
IDS = [0, -1, 1, SMALLEST, GREATEST, *(n << 48 for n in range(1, 6)), *range(2, 12)]


def ids_tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def make(kind: str = "rowwise_adagrad", seed: int = 3, **settings: object) -> DynamicTable:
    config = DynamicTableConfig(**{"reserve_rows": 64, "init_std": 0.5, **settings})  # type: ignore[arg-type]
    return DynamicTable("item", DIMS, config, seed=seed, rule=FusedRule(row_optimizers()[kind](), 0.5))


def train(table: DynamicTable, ids: list[int], step: int, weights: list[float] | None = None) -> Tensor:
    """One step whose gradient of an occurrence is its weight in every column of every group."""
    rows = table.lookup(ids_tensor(ids), train=True, step=step)
    weight_N = torch.tensor(weights if weights is not None else [1.0] * len(ids))
    loss = sum((table.rows(group, rows) * weight_N[:, None]).sum() for group in DIMS)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    table.update()
    table.finish_step(step)
    return rows


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@dataclass
class ModelRow:
    """What the model knows of an id with a row."""

    values: dict[str, np.ndarray]
    last_seen: int
    count: int = 0


@dataclass
class Model:
    """A dynamic table as one would write it down: dicts, sorting, SGD with a learning rate of 1/2."""

    threshold: int
    max_rows: int
    rows: dict[int, ModelRow] = field(default_factory=dict)
    pending: Counter[int] = field(default_factory=Counter)

    def step(self, ids: list[int], step: int) -> list[bool]:
        unknown = [word for word in ids if word not in self.rows]
        self.pending.update(unknown)
        for word in dict.fromkeys(unknown):
            if self.pending[word] >= self.threshold:
                del self.pending[word]
                self.rows[word] = ModelRow({g: first_values(word, g) for g in DIMS}, step)
        for word in ids:
            if word in self.rows:
                row = self.rows[word]
                row.count, row.last_seen = row.count + 1, max(row.last_seen, step)
        for word, times in Counter(ids).items():
            if word in self.rows:
                for group, values in self.rows[word].values.items():
                    self.rows[word].values[group] = values - np.float32(0.5) * np.float32(times)
        return [word in self.rows for word in ids]

    def keep_capacity(self) -> None:
        if len(self.rows) > self.max_rows:
            order = sorted(self.rows, key=lambda word: (self.rows[word].last_seen, self.rows[word].count, word))
            self.drop(order[: len(order) - self.max_rows // 2])

    def drop(self, ids: list[int]) -> None:
        for word in ids:
            self.rows.pop(word, None)


def first_values(word: int, group: str) -> np.ndarray:
    return initial_values(np.array([word]), DIMS[group], seed=3, group=group, table="item", std=0.5)[0]


class TableMachine(RuleBasedStateMachine):
    """Training, reading, eviction and reloading in any order."""

    @initialize(threshold=st.integers(1, 3), max_rows=st.integers(4, 16))
    def begin(self, threshold: int, max_rows: int) -> None:
        admission: AdmissionConfig = Frequency(threshold=threshold) if threshold > 1 else Always()
        self.config = {"admission": admission, "eviction": (Capacity(max_rows=max_rows, fill=0.5),), "evict_every": 0, "reserve_rows": 4}
        self.table = make("sgd", **self.config)
        self.model = Model(threshold, max_rows)
        self.now = 0

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=25), forward=st.integers(0, 2))
    def train(self, ids: list[int], forward: int) -> None:
        self.now += forward
        rows = train(self.table, ids, self.now)
        assert (rows != 0).tolist() == self.model.step(ids, self.now)
        self.model.keep_capacity()

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=10))
    def read(self, ids: list[int]) -> None:
        rows = self.table.lookup(ids_tensor(ids), train=False)
        for group, dim in DIMS.items():
            wanted = [self.model.rows[word].values[group] if word in self.model.rows else np.zeros(dim) for word in ids]
            values = self.table.rows(group, rows).detach().numpy()
            assert (values == np.array(wanted, np.float32).reshape(-1, dim)).all()

    @rule(max_age=st.integers(0, 3))
    def evict_old(self, max_age: int) -> None:
        old = [word for word, row in self.model.rows.items() if row.last_seen < self.now - max_age]
        assert self.table.evict(LastSeen(max_age=max_age)) == len(old)
        self.model.drop(old)

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=5))
    def remove(self, ids: list[int]) -> None:
        assert self.table.remove(ids_tensor(ids)) == len(set(ids) & self.model.rows.keys())
        self.model.drop(ids)

    @rule()
    def reload(self) -> None:
        state = self.table.state()
        self.table = make("sgd", **self.config)
        self.table.load_state(state)
        assert_same(self.table.state(), state)
        self.table.finish_step(self.now)  # the clock is told by the next step

    @invariant()
    def same_model(self) -> None:
        state, ids = self.table.state(), sorted(self.model.rows)
        assert state["id"].tolist() == ids
        assert state["count"].tolist() == [self.model.rows[word].count for word in ids]
        assert state["last_seen"].tolist() == [self.model.rows[word].last_seen for word in ids]
        for group, dim in DIMS.items():
            wanted = [self.model.rows[word].values[group] for word in ids]
            assert (state[f"value.{group}"].numpy() == np.array(wanted, np.float32).reshape(len(ids), dim)).all()
        assert not any(self.table.values(group)[0].any() for group in DIMS)
        assert self.table.statistics().size == len(ids) == len(self.table)


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_updates_equal_torch(kind: str, weight_decay: float) -> None:
    """A dense table of the same ids, trained by the textbook formula."""
    settings = {} if kind == "sgd" else {"initial_accumulator": 0.3}
    rule = FusedRule(row_optimizers()[kind](weight_decay=weight_decay, **settings), 0.1)
    table = DynamicTable("item", {"deep": 4}, DynamicTableConfig(reserve_rows=8), seed=0, rule=rule)
    ids = np.array([5, -5, 1 << 60, 0])
    dense = torch.from_numpy(initial_values(ids, 4, seed=0, group="deep", table="item", std=0.01))
    total = torch.full((4, 4) if kind == "adagrad" else (4,), 0.3)
    rng = np.random.default_rng(0)
    for step in range(30):
        place = rng.integers(0, 4, 7)
        grad_ND = torch.from_numpy(rng.standard_normal((7, 4)).astype(np.float32))
        rows = table.lookup(torch.from_numpy(ids[place]), train=True, step=step)
        (table.rows("deep", rows) * grad_ND).sum().backward()
        table.update(lr_scale=0.5)
        table.finish_step(step)
        for row in set(place.tolist()):
            gradient = grad_ND[torch.from_numpy(place == row)].sum(0) + weight_decay * dense[row]
            if kind != "sgd":
                total[row] += gradient.square() if kind == "adagrad" else gradient.square().mean()
                gradient = gradient / (total[row].sqrt() + 1e-8)
            dense[row] -= 0.05 * gradient
    order = np.argsort(ids)
    torch.testing.assert_close(table.state()["value.deep"], dense[order], rtol=1e-5, atol=1e-6)
    if kind != "sgd":
        torch.testing.assert_close(table.state()["state.deep.sum"], total[order], rtol=1e-5, atol=1e-6)


def test_rows_without_an_id_take_no_gradient() -> None:
    table = make(admission=Frequency(threshold=2))
    train(table, [1, 2, 2, 3], 0)
    assert table.state()["id"].tolist() == [2]
    assert not table.values("deep")[0].any()
    assert (table.lookup(ids_tensor([1, 2, 3]), train=False) != 0).tolist() == [False, True, False]


def test_reading_changes_nothing() -> None:
    table = make()
    train(table, [1, 2, 3], 0)
    before = table.state()
    with torch.no_grad():
        table.rows("deep", table.lookup(ids_tensor([1, 1, 9, 10]), train=False))
    assert_same(table.state(), before)


def test_shapes_and_missing_ids() -> None:
    table = make()
    ids = torch.arange(6).view(2, 3)
    missing = torch.tensor([[False, True, False], [True, False, False]])
    rows = table.lookup(ids, train=True, step=0, missing=missing)
    assert rows.shape == (2, 3)
    assert (rows == 0).tolist() == missing.tolist()
    assert table.state()["id"].tolist() == [0, 2, 4, 5]
    values = table.rows("deep", rows)
    assert values.shape == (2, 3, 3)
    values.sum().backward()
    table.update()
    assert table.lookup(ids.t(), train=False).tolist() == rows.where(~missing, 0).t().tolist()
    assert table.lookup(torch.empty(0, 4, dtype=torch.int64), train=True, step=1).shape == (0, 4)


@given(st.lists(st.lists(st.sampled_from(IDS), unique=True, max_size=12), max_size=10), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_order_within_a_step_does_not_matter(steps: list[list[int]], random: object) -> None:
    """The same steps with the rows of each shuffled give the same bits; row numbers may differ."""
    one, other = (make(admission=Probability(probability=0.5), eviction=(Capacity(max_rows=8, by="lfu"),)) for _ in range(2))
    for step, ids in enumerate(steps):
        train(one, ids, step, [word % 7 - 3.3 for word in ids])
        shuffled = ids.copy()
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        train(other, shuffled, step, [word % 7 - 3.3 for word in shuffled])
    assert_same(one.state(), other.state())


@pytest.mark.parametrize(
    "admission",
    [Always(), Frequency(threshold=3), Frequency(threshold=3, halve_every=4), Probability(probability=0.3)],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_together_are_the_whole(admission: AdmissionConfig, world_size: int) -> None:
    """Each process holds the ids that are its own; what they hold together equals one process bit for bit."""
    rng = np.random.default_rng(0)
    settings_ = {"admission": admission, "eviction": (LastSeen(max_age=6),), "evict_every": 3}
    whole, shards = make(**settings_), [make(**settings_) for _ in range(world_size)]
    for step in range(25):
        ids, weights = rng.integers(-40, 40, 50), rng.standard_normal(50)
        train(whole, ids.tolist(), step, weights.tolist())
        owner = shard_of(ids, world_size)
        for rank, shard in enumerate(shards):
            train(shard, ids[owner == rank].tolist(), step, weights[owner == rank].tolist())
    states = [shard.state() for shard in shards]
    ids = torch.cat([state["id"] for state in states])
    order = ids.argsort()
    for name, value in whole.state().items():
        parts = torch.cat([state[name] for state in states])
        assert torch.equal(parts[parts.argsort()] if name.startswith("pending") else parts[order], value), name
    assert all(0 < len(state["id"]) < len(ids) for state in states)


def test_arrival_order_does_not_change_first_values() -> None:
    one, other = make(), make()
    for step, word in enumerate(IDS):
        one.lookup(ids_tensor([word]), train=True, step=step)
    other.lookup(ids_tensor(IDS[::-1]), train=True, step=0)
    for group in DIMS:
        assert torch.equal(one.state()[f"value.{group}"], other.state()[f"value.{group}"])


def test_growth_beyond_the_reservation_keeps_everything() -> None:
    table = make(reserve_rows=1)
    for step in range(12):
        train(table, list(range(3**step % 1000, 3**step % 1000 + 2**step)), step)
    whole = make(reserve_rows=1 << 16)
    for step in range(12):
        train(whole, list(range(3**step % 1000, 3**step % 1000 + 2**step)), step)
    assert_same(table.state(), whole.state())
    assert len(table) > 2000


def test_known_ids_never_move_a_full_table() -> None:
    table = make(reserve_rows=11)
    table.lookup(torch.arange(10), train=True, step=0)
    rows = table.storage._book.rows
    table.lookup(torch.arange(10).repeat(50), train=True, step=1)
    assert table.storage._book.rows is rows
    table.lookup(torch.tensor([10]), train=True, step=2)
    assert table.storage.num_rows == 22


def test_statistics() -> None:
    table = make(admission=Frequency(threshold=2), eviction=(Capacity(max_rows=2, fill=0.5),), evict_every=0)
    assert np.isnan(table.statistics().hit_rate)
    train(table, [1, 1, 2, 3], 0)  # 1 admitted; 2 and 3 wait
    train(table, [1, 2, 4], 1)  # 1 hit; 2 admitted
    table.lookup(ids_tensor([1, 2, 3, 4]), train=False)
    figures = table.statistics()
    assert (figures.size, figures.max_rows, figures.pending) == (2, 2, 2)
    assert (figures.lookups, figures.hits, figures.admitted, figures.rejected, figures.evicted) == (11, 3, 2, 3, 0)
    assert figures.hit_rate == 3 / 11
    assert figures.load_factor == 2 / 16
    train(table, [5, 5], 2)
    assert table.statistics().evicted == 2
    metrics = table.statistics().as_metrics("table.item")
    assert metrics["table.item.size"] == 1.0
    assert metrics["table.item.hit_rate"] == figures.hits / 13
    assert all(isinstance(value, float) for value in metrics.values())


def test_memory_is_counted() -> None:
    table = make(reserve_rows=10_000)
    before = table.statistics().num_bytes
    table.lookup(torch.arange(5000), train=True, step=0)
    row_bytes = 24 + 4 * (3 + 1) + 4 * (1 + 1)  # book, values, one sum a row and group
    assert table.statistics().num_bytes - before == 5000 * row_bytes + 16 * (8192 - 16)


@pytest.mark.parametrize(
    "ids", [torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), torch.empty(1, dtype=torch.int64, device="meta")]
)
def test_ids_of_another_type_are_refused(ids: Tensor) -> None:
    with pytest.raises(DataError, match="int64 on cpu is needed"):
        make().lookup(ids, train=False)


def test_training_needs_a_step_and_a_clock() -> None:
    for step in (None, -1):
        with pytest.raises(ValueError, match="number, 0 or more"):
            make().lookup(ids_tensor([1]), train=True, step=step)
    with pytest.raises(ValueError, match="`now` is needed"):
        make(clock="seconds").lookup(ids_tensor([1]), train=True, step=0)


@pytest.mark.parametrize("dims", [{}, {"deep": 0}])
def test_dims_are_checked(dims: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="dim of at least 1"):
        DynamicTable("item", dims, DynamicTableConfig(), seed=0)


def test_configuration_from_a_mapping() -> None:
    data = {
        "admission": {"kind": "frequency", "threshold": 3, "counter": {"kind": "bloom", "expected_ids": 1000}},
        "eviction": [{"kind": "last_seen", "max_age": 7}, {"kind": "capacity", "max_rows": 100, "by": "lfu"}],
    }
    config = DynamicTableConfig.parse(data, "table")
    assert config.admission == Frequency(threshold=3, counter=BloomCounter(expected_ids=1000))
    assert config.eviction == (LastSeen(max_age=7), Capacity(max_rows=100, by="lfu"))
    assert DynamicTableConfig.parse(config.model_dump(mode="json"), "table") == config
    with pytest.raises(SpecError, match=r"unknown key 'max_row'; did you mean 'max_rows'"):
        DynamicTableConfig.parse({"eviction": [{"kind": "capacity", "max_row": 100}]}, "table")


def test_evicted_ids_come_back_as_new() -> None:
    table = make()
    train(table, [1, 2], 0)
    table.remove(ids_tensor([1]))
    train(table, [3], 1)  # takes the free row
    train(table, [1], 2)
    fresh = make()
    train(fresh, [1], 2)
    mine, theirs = table.state(), fresh.state()
    place = mine["id"].tolist().index(1)
    for name in ("value.deep", "value.linear", "state.deep.sum", "state.linear.sum", "count", "last_seen"):
        assert torch.equal(mine[name][place], theirs[name][0]), name


def test_a_clock_of_seconds_is_read_where_no_time_is_given():
    table = make(clock="seconds", eviction=(LastSeen(max_age=3600),), evict_every=1)
    table.prepare(ids_tensor([1, 2]), step=0)
    assert table.finish_step(0) == 0
    table.prepare(ids_tensor([2]), step=1)
    assert table.finish_step(1, now=time.time() + 3700) == 2


def test_ids_stand_for_several_occurrences():
    """As if each id came so often; one that stands for none is found and not counted."""
    one, other = (make(admission=Frequency(threshold=3)) for _ in range(2))
    for step in range(2):
        ids, times = ids_tensor([7, 9, 8, 5]), torch.tensor([3, 0, 1, 2])
        rows = one.prepare(ids, step=step, times=times)
        other.prepare(ids.repeat_interleave(times), step=step)
        assert (rows > 0).tolist() == [True, False, False, step == 1]
        for table in (one, other):
            table.finish_step(step)
    assert_same(one.state(), other.state())
    assert one.prepare(ids_tensor([5, 7, 8]), step=2, times=torch.tensor([0, 0, 0])).bool().tolist() == [True, True, False]
    assert one.statistics().lookups == other.statistics().lookups
