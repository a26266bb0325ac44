"""Tiered tables: the same bits as in memory whatever the cache, the placement and the prefetch; errors."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.embedding.managed import ManagedTable
from ninerank.embedding.pending import PendingGradients
from ninerank.embedding.table import TableGroup, TableLayout
from ninerank.embedding.tiers import TierConfig, TieredTable
from ninerank.errors import CheckpointError, DataError, SpecError
from ninerank.fusion.kernels.embedding_update import FTRL, SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad
from ninerank.fusion.lookup import sequence

OPTIMIZERS: dict[str, RowOptimizer] = {
    "sgd": SGD(weight_decay=0.01),
    "adagrad": Adagrad(initial_accumulator=0.1, max_row_norm=0.5),
    "rowwise_adagrad": RowwiseAdagrad(max_gradient=0.7),
    "adam": Adam(),
    "ftrl": FTRL(l1=0.01, l2=0.1),
}
DIMS = {"deep": 4, "linear": 1}
LR, SEED, STD = 0.1, 3, 0.5


class MemoryTable:
    """Values and states of all rows in ordinary storages."""

    def __init__(self, name: str, num_rows: int, dims: Mapping[str, int], optimizer: RowOptimizer) -> None:
        self.optimizer = optimizer
        layout = TableLayout.of({name: num_rows})
        self.values = {
            group: TableGroup.drawn(group, layout, dim, sparse=True, init_std=STD, seed=SEED).table(name) for group, dim in dims.items()
        }
        self.states = {group: optimizer.new_state(values, torch.tensor([LR])) for group, values in self.values.items()}
        self.gradients = {group: PendingGradients() for group in dims}

    def num_rows(self, group: str) -> int:
        return len(self.values[group])

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        return sequence(self.values[group].requires_grad_(), row_N, on_grad=self.gradients[group].add)

    def update(self, lr_scale: float = 1.0) -> None:
        lr_T, first_row_T = torch.tensor([LR * lr_scale]), torch.zeros(1, dtype=torch.int64)
        for group, gradients in self.gradients.items():
            gradients.apply(self.values[group].detach(), self.states[group], first_row_T, lr_T, self.optimizer)
            gradients.clear()

    def state(self) -> dict[str, Tensor]:
        state = {f"value.{group}": values.detach() for group, values in self.values.items()}
        for group, states in self.states.items():
            state |= {f"state.{group}.{name}": tensor for name, tensor in zip(self.optimizer.state_names, states, strict=True)}
        return state


def id_stream(kind: str, num_rows: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of ids: uniform ones, or a few that come again and again."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, num_rows + 1) ** (-1.05 if kind == "zipf" else 0.0)
    order = rng.permutation(num_rows)
    while True:
        yield torch.from_numpy(order[rng.choice(num_rows, batch, p=weights / weights.sum())])


def train(table: TieredTable | MemoryTable, ids: Tensor, step: int, upcoming: Tensor | None = None) -> dict[str, Tensor]:
    """One step with a loss that no two rows share, its gradients clipped by norm every second time.

    Returns what was looked up, and the norms.
    """
    rng = np.random.default_rng(step)
    tiered = table if isinstance(table, TieredTable) else None
    rows = tiered.prepare(ids, step=step) if tiered else ids
    if tiered and upcoming is not None:
        tiered.prefetch(upcoming)
    out = {group: table.rows(group, rows) for group in DIMS}
    first, second = np.split(np.arange(len(ids)), [len(ids) // 2])
    loss = torch.zeros(())
    for values in out.values():
        factors = torch.from_numpy(rng.standard_normal(values.shape).astype(np.float32))
        loss = loss + (values[first] * factors[first]).sum() + (values[second] ** 2 * factors[second]).sum()
    # A second lookup of some of the same rows: its gradients are merged with those of the first.
    loss = loss + table.rows("deep", rows[: len(ids) // 3]).sum()
    loss.backward()
    norms = {}
    if step % 2:
        for group, gradients in table.gradients.items():
            grad = gradients.coalesced(table.num_rows(group))
            assert grad is not None
            norms[f"{group} norm"] = torch.linalg.vector_norm(grad.grad_GD)
            gradients.scale_(torch.clamp(2.0 / norms[f"{group} norm"], max=1.0))
    table.update(1.0 if isinstance(table.optimizer, FTRL) else 0.5 + 0.1 * (step % 3))
    if tiered:
        tiered.finish_step(step)
    return {group: values.detach() for group, values in out.items()} | norms


def assert_equal(met: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, and the same bits under each."""
    assert met.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert met[name].dtype == tensor.dtype, name
        assert met[name].shape == tensor.shape, name
        assert torch.equal(met[name].contiguous().view(torch.int32), tensor.contiguous().view(torch.int32)), name


def tiered(num_rows: int, config: dict[str, Any], optimizer: RowOptimizer = SGD(), **more: Any) -> TieredTable:  # noqa: B008 (frozen)
    table = TieredTable("item", num_rows, DIMS, TierConfig.parse(config, "tier"), seed=SEED, init_std=STD, **more)
    table.train_with(optimizer, LR)
    return table


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["zipf", "uniform"]),
    placement=st.sampled_from(["host", "disk"]),
    rule=st.sampled_from(sorted(OPTIMIZERS)),
    decay=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**20),
    num_rows=st.integers(30, 300),
    batch=st.integers(1, 40),
    spare=st.integers(0, 9),
    steps=st.integers(1, 12),
    is_early=st.booleans(),
)
def test_equals_a_table_in_memory(
    kind: str, placement: str, rule: str, decay: float, seed: int, num_rows: int, batch: int, spare: int, steps: int, is_early: bool
) -> None:
    """With and without prefetch, at once: what is looked up at every step, and everything at the end.

    is_early: the next batch is announced before this one begins, so that much of what is read ahead is trained before it is used.
    """
    optimizer = OPTIMIZERS[rule]
    batches = list(islice(id_stream(kind, num_rows, batch, seed), steps + 1))
    cache_rows = max(len(ids.unique()) for ids in batches) + spare
    with ExitStack() as stack:
        tables = []
        for prefetch in (True, False):
            place = {"directory": stack.enter_context(tempfile.TemporaryDirectory())} if placement == "disk" else {}
            config = {"placement": placement, "cache_rows": cache_rows, "prefetch": prefetch, "decay": decay, **place}
            tables.append(stack.enter_context(tiered(num_rows, config, optimizer)))
        memory = MemoryTable("item", num_rows, DIMS, optimizer)
        for step, (ids, upcoming) in enumerate(pairwise(batches)):
            wanted = train(memory, ids, step)
            for table in tables:
                if is_early:
                    table.prefetch(upcoming)
                assert_equal(train(table, ids, step, None if is_early else upcoming), wanted)
        for table in tables:
            assert_equal(table.state(), memory.state())
        assert [t.statistics().evictions for t in tables[1:]] == [tables[0].statistics().evictions] * (len(tables) - 1)


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("rule", sorted(OPTIMIZERS))
def test_long_run_with_evictions(rule: str, placement: str, tmp_path: Any) -> None:
    """A cache of a tenth of the table: most of what is trained has been evicted and come back."""
    place = {"directory": str(tmp_path)} if placement == "disk" else {}
    memory = MemoryTable("item", 2000, DIMS, OPTIMIZERS[rule])
    with tiered(2000, {"placement": placement, "cache_rows": 200, **place}, OPTIMIZERS[rule]) as table:
        batches = list(islice(id_stream("zipf", 2000, 250, 1), 41))
        for step, (ids, upcoming) in enumerate(pairwise(batches)):
            assert_equal(train(table, ids, step, upcoming), train(memory, ids, step))
        assert_equal(table.state(), memory.state())
        figures = table.statistics()  # the background thread has done what was asked of it before the state's writes
        record_bytes = sum(tensor[0].nbytes for tensor in table.state().values())
    assert figures.evictions > 2000
    assert figures.size == figures.cache_rows == 200
    assert 0.2 < figures.hit_rate < 0.9
    assert figures.hits + figures.misses == sum(len(ids.unique()) for ids in batches[:-1])
    # Announced while the batch before it trains, every miss but those of the first batch has been read ahead.
    assert figures.prefetched == figures.misses - len(batches[0].unique())
    assert figures.bytes_read == (figures.misses + len(table_misses(batches[-1], table))) * record_bytes
    assert 0 < figures.bytes_written <= (figures.evictions + figures.size) * record_bytes
    assert figures.as_metrics("tier.item")["tier.item.evictions"] == figures.evictions


def table_misses(ids: Tensor, table: TieredTable) -> set[int]:
    """Rows of the last announcement that the cache did not hold: read, and not used any more."""
    return set(ids.tolist()) - set(table._cache.slots.row.tolist())


def test_reading_between_announcement_and_batch() -> None:
    """Evaluation in between throws rows out that were announced, and ones that the announcement had found on the device."""
    memory = MemoryTable("item", 400, DIMS, OPTIMIZERS["adam"])
    with tiered(400, {"cache_rows": 40}, OPTIMIZERS["adam"]) as table:
        batches = list(islice(id_stream("uniform", 400, 30, 5), 31))
        for step, (ids, upcoming) in enumerate(pairwise(batches)):
            assert_equal(train(table, ids, step, upcoming), train(memory, ids, step))
            for first in (0, 40, 80):
                some = torch.arange(first, first + 40)
                with torch.no_grad():
                    rows = table.rows("deep", table.prepare(some, step=None))
                assert torch.equal(rows, memory.values["deep"][some].detach())
            if step % 2:
                table.prefetch(upcoming)
        assert_equal(table.state(), memory.state())


def test_stale_reads_are_dropped() -> None:
    """Rows read ahead, then trained and evicted by batches in between, are read once more."""
    memory = MemoryTable("item", 30, DIMS, SGD())
    with tiered(30, {"cache_rows": 6}) as table:
        table.prefetch(torch.arange(5))
        for step, (ids, prefetched) in enumerate(((torch.arange(3), 3), (torch.arange(10, 16), 3), (torch.arange(5), 5))):
            assert_equal(train(table, ids, step), train(memory, ids, step))
            assert table.statistics().prefetched == prefetched
        assert_equal(table.state(), memory.state())


def test_announcement_that_is_not_kept() -> None:
    memory = MemoryTable("item", 100, DIMS, SGD())
    with tiered(100, {"cache_rows": 20}) as table:
        for step, ids in enumerate(islice(id_stream("uniform", 100, 15, 2), 20)):
            table.prefetch(torch.arange(step, step + 10))
            table.prefetch(torch.tensor([100, -1]))
            assert_equal(train(table, ids, step), train(memory, ids, step))


def test_two_steps_in_flight_keep_their_rows() -> None:
    memory = MemoryTable("item", 100, DIMS, SGD())
    with tiered(100, {"cache_rows": 8}) as table:
        first, second = torch.tensor([5, 6, 7]), torch.tensor([7, 50, 51])
        slots = table.prepare(first, step=0), table.prepare(second, step=1)
        with pytest.raises(DataError, match=r"4 distinct ids, its cache 8 rows, 5 of them in use by other batches in flight"):
            table.prepare(torch.tensor([90, 91, 92, 93]), step=2)
        for step, (rows, ids) in enumerate(zip(slots, (first, second), strict=True)):
            for each, place in ((table, rows), (memory, ids)):
                each.rows("deep", place).sum().backward()
                each.update()
            table.finish_step(step)
        assert table.prepare(torch.arange(90, 98), step=2).shape == (8,)
        table.finish_step(2)
        assert_equal(table.state(), memory.state())


def test_gradients_need_an_open_step_and_an_update() -> None:
    with tiered(10, {"cache_rows": 4}) as table:
        assert not table.rows("deep", table.prepare(torch.tensor([1]), step=None)).requires_grad
        slots = table.prepare(torch.tensor([[1, 2], [2, 1]]), step=0)
        assert slots.shape == (2, 2)
        values = table.rows("deep", slots)
        assert values.shape == (2, 2, 4)
        assert table.gradients["deep"].coalesced(10) is None
        values.sum().backward()
        table.rows("deep", slots).sum().backward()
        grad = table.gradients["deep"].coalesced(10)
        assert grad is not None
        assert torch.equal(grad.grad_GD, torch.full((2, 4), 4.0))
        with pytest.raises(RuntimeError, match="step 0 ends with gradients left"):
            table.finish_step(0)
        table.zero_grad()
        table.update()
        table.finish_step(0)
        assert_equal(table.state(), MemoryTable("item", 10, DIMS, SGD()).state())


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_state_goes_over_to_another_table(placement: str, tmp_path: Any) -> None:
    memory, stream = MemoryTable("item", 70_000, DIMS, Adam()), id_stream("uniform", 70_000, 50, 8)
    with ExitStack() as stack:

        def make(name: str, cache_rows: int) -> TieredTable:
            place = {"directory": str(tmp_path / name)} if placement == "disk" else {}
            return stack.enter_context(tiered(70_000, {"placement": placement, "cache_rows": cache_rows, **place}, Adam()))

        table = make("one", 60)
        for step in range(6):
            ids = next(stream)
            train(memory, ids, step)
            train(table, ids, step)
            if step == 2:
                last, table = table, make("two", 90)
                train(table, next(id_stream("zipf", 70_000, 80, 1)), 0)  # to be forgotten
                table.prefetch(torch.arange(20))
                table.load_state({name: tensor.clone() for name, tensor in last.state().items()})
        blocks = list(table.state_blocks(30_000))
        assert [first for first, _ in blocks] == [0, 30_000, 60_000]
        assert_equal({name: torch.cat([block[name] for _, block in blocks]) for name in blocks[0][1]}, memory.state())


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    with tiered(10, {"cache_rows": 4}, Adam()) as table:
        train(table, torch.tensor([1, 2]), 0)
        state = {name: tensor.clone() for name, tensor in table.state().items()}
        wrong: list[tuple[dict[str, Tensor], str]] = [
            ({name: state[name] for name in state if name != "state.deep.v"}, "'state.deep.v' is missing"),
            ({**state, "state.deep.z": state["state.deep.v"]}, "'state.deep.z' is not of this table"),
            ({**state, "value.deep": torch.zeros(11, 4)}, r"'value.deep' is torch.float32 \(11, 4\), torch.float32 \(10, 4\) is needed"),
            ({**state, "state.deep.step": torch.zeros(10)}, "torch.int32"),
        ]
        for given_state, message in wrong:
            with pytest.raises(CheckpointError, match=message):
                table.load_state(given_state)
        table.prepare(torch.tensor([1]), step=1)
        with pytest.raises(RuntimeError, match="in the middle of step 1"):
            table.load_state(state)
        assert_equal(table.state(), state)


def test_ids_that_cannot_be() -> None:
    with tiered(10, {"cache_rows": 4}) as table:
        for ids, wrong in (([3, 10], 10), ([-1, 3], -1), ([0, 2**62], 2**62)):
            with pytest.raises(DataError, match=rf"table 'item': id {wrong} is outside its 10 rows \(valid: 0 to 9\)"):
                table.prepare(torch.tensor(ids), step=0)
        with pytest.raises(DataError, match=r"torch.int32 on cpu; int64 on cpu is needed"):
            table.prepare(torch.tensor([1], dtype=torch.int32), step=0)
        with pytest.raises(DataError, match="a batch has 5 distinct ids, its cache 4 rows; give the tier more cache_rows"):
            table.prepare(torch.arange(5), step=0)
        assert table.statistics().hits == table.statistics().misses == 0
        assert np.isnan(table.statistics().hit_rate)
        assert table.prepare(torch.empty(0, 3, dtype=torch.int64), step=0).shape == (0, 3)
        table.rows("deep", torch.empty(0, 3, dtype=torch.int64)).sum().backward()
        table.update()
        table.finish_step(0)
        table.prepare(torch.tensor([9, 8, 7, 6, 9]), step=1)


def test_sizes_and_settings_that_cannot_be() -> None:
    for num_rows, dims in ((0, DIMS), (5, {}), (5, {"deep": 0})):
        with pytest.raises(SpecError, match="a row and a group of dim 1 or more are needed"):
            TieredTable("item", num_rows, dims, TierConfig(cache_rows=3), seed=0)
    for config, message in (
        ({"cache_rows": 0}, "tier: cache_rows"),
        ({"cache_rows": 5, "placement": "disk"}, "needs a directory"),
        ({"cache_rows": 5, "directory": "/tmp/x"}, "belong to placement 'disk'"),
        ({"cache_rows": 5, "keep": True}, "belong to placement 'disk'"),
        ({"cache_rows": 5, "decay": 0.0}, "tier: decay"),
        ({"cache_row": 5}, "did you mean 'cache_rows'"),
    ):
        with pytest.raises(SpecError, match=message):
            TierConfig.parse(config, "tier")


def test_a_cache_for_all_rows_never_evicts() -> None:
    with tiered(20, {"cache_rows": 1000}) as table:
        for step, ids in enumerate(islice(id_stream("uniform", 20, 15, 0), 10)):
            train(table, ids, step)
        figures = table.statistics()
    assert (figures.cache_rows, figures.evictions, figures.bytes_written) == (20, 0, 0)
    table.close()


def test_values_alone_and_an_optimizer_given_later() -> None:
    """A table that was read, or took another's values, starts its state from these when it is told the optimizer."""
    values = {f"value.{group}": torch.randn(300, dim, generator=torch.Generator().manual_seed(1)) for group, dim in DIMS.items()}
    memory = MemoryTable("item", 300, DIMS, OPTIMIZERS["ftrl"])
    for group in DIMS:
        memory.values[group] = values[f"value.{group}"].clone()
        memory.states[group] = memory.optimizer.new_state(memory.values[group], torch.tensor([LR]))
    table: ManagedTable = TieredTable("item", 300, DIMS, TierConfig(cache_rows=40), seed=SEED, init_std=STD)
    assert isinstance(table, TieredTable)
    with table:
        start = MemoryTable("item", 300, DIMS, SGD()).state()
        assert torch.equal(table.rows("deep", table.prepare(torch.arange(40))), start["value.deep"][:40])
        assert table.state().keys() == table.values_state().keys() == values.keys()
        table.load_values(values)
        assert_equal(table.values_state(), values)
        table.train_with(OPTIMIZERS["ftrl"], LR)
        assert_equal(table.state(), memory.state())
        for step, ids in enumerate(islice(id_stream("zipf", 300, 50, 4), 8)):
            assert_equal(train(table, ids, step), train(memory, ids, step))
        assert_equal(table.state(), memory.state())
        table.load_values(values)
        assert torch.equal(table.state()["state.deep.z"], memory.optimizer.new_state(values["value.deep"], torch.tensor([LR]))[0])
        assert table.metrics()["table.item.evictions"] > 0
        with pytest.raises(CheckpointError, match="'state.deep.n' is not of this table"):
            table.load_values(table.state())
        state = {name: tensor.clone() for name, tensor in table.state().items()}
        train(table, torch.arange(30), 8)
        assert not torch.equal(table.state()["value.deep"], state["value.deep"])
        state = {name: tensor.clone() for name, tensor in table.state().items()}
        table.move_to("cpu")
        assert_equal(table.state(), state)
        table.prepare(torch.tensor([1]), step=9)
        with pytest.raises(RuntimeError, match="an optimizer is given in the middle of step 9"):
            table.train_with(SGD(), LR)
        with pytest.raises(RuntimeError, match="the device is changed in the middle of step 9"):
            table.move_to("cpu")
    with pytest.raises(RuntimeError, match="is closed"):
        table.prepare(torch.tensor([1]))


def test_gradients_without_an_optimizer() -> None:
    with TieredTable("item", 30, DIMS, TierConfig(cache_rows=4), seed=SEED) as table:
        table.rows("deep", table.prepare(torch.tensor([1]), step=0)).sum().backward()
        with pytest.raises(RuntimeError, match="has gradients and no optimizer"):
            table.update()
