"""States by raw id: the same model after a reload, whatever the rows were, and on any number of processes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ninerank.embedding.dynamic import (
    Always,
    BloomCounter,
    DynamicTable,
    DynamicTableConfig,
    Frequency,
    FusedRule,
    LastSeen,
    reshard,
    shard_of,
)
from ninerank.embedding.dynamic.admission import AdmissionConfig
from ninerank.errors import CheckpointError
from ninerank.fusion.kernels.embedding_update import row_optimizers

ADMISSIONS = [Always(), Frequency(threshold=3), Frequency(threshold=3, counter=BloomCounter(expected_ids=10_000, false_positive_rate=1e-4))]

SHARDS = [266, 875, 163, 958, 495]


def make(admission: AdmissionConfig, kind: str = "adagrad", dim: int = 3) -> DynamicTable:
    config = DynamicTableConfig(admission=admission, eviction=(LastSeen(max_age=9),), evict_every=4, reserve_rows=256, init_std=0.5)
    rule = FusedRule(row_optimizers()[kind](), 0.1)
    return DynamicTable("t", {"deep": dim, "linear": 1}, config, seed=1, rule=rule)


def history(seed: int = 0, steps: int = 30) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(-30, 30, 40) * 2**57, rng.standard_normal(40).astype(np.float32)) for _ in range(steps)]


def train(table: DynamicTable, ids: np.ndarray, weights: np.ndarray, step: int) -> None:
    rows = table.lookup(torch.from_numpy(ids), train=True, step=step)
    for group in table.dims:
        (table.rows(group, rows) * torch.from_numpy(weights)[:, None]).sum().backward()
    table.update()
    table.finish_step(step)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_stop_and_go_on(admission: AdmissionConfig) -> None:
    whole, first = make(admission), make(admission)
    steps = history()
    for step, (ids, weights) in enumerate(steps):
        train(whole, ids, weights, step)
        if step < 13:
            train(first, ids, weights, step)
    second = make(admission)
    train(second, *history(7)[0], 0)  # whatever it holds goes
    second.load_state(first.state())
    assert_same(second.state(), first.state())
    assert second.values("deep").shape == (len(second) + 1, 3)
    for step, (ids, weights) in enumerate(steps[13:], 13):
        train(second, ids, weights, step)
    assert_same(second.state(), whole.state())


@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 3)])
def test_another_number_of_processes(admission: AdmissionConfig, before: int, after: int) -> None:
    """N processes train, M take over; what they hold together equals one process that did it all."""
    whole, old, new = make(admission), [make(admission) for _ in range(before)], [make(admission) for _ in range(after)]
    for step, (ids, weights) in enumerate(history()):
        train(whole, ids, weights, step)
        if step == 15:
            for table, state in zip(new, reshard([table.state() for table in old], after), strict=True):
                table.load_state(state)
        tables = old if step < 15 else new
        owner = shard_of(ids, len(tables))
        for rank, table in enumerate(tables):
            train(table, ids[owner == rank], weights[owner == rank], step)
    (merged,) = reshard([table.state() for table in new], 1)
    wanted = whole.state()
    for state in (merged, wanted):
        state.pop("pending.counters", None)  # sums of filters: upper bounds, not the same bytes
    assert_same(merged, wanted)


def test_shards_are_even_and_fixed() -> None:
    ids = np.arange(100_000) << 32
    for world_size in (1, 2, 3, 7, 64):
        counts = np.bincount(shard_of(ids, world_size), minlength=world_size)
        assert len(counts) == world_size
        assert np.abs(counts - 1e5 / world_size).max() < 6 * np.sqrt(1e5 / world_size)
    assert shard_of(np.array([0, -1, 1, 2**63 - 1, 12345]), 1000).tolist() == SHARDS


def wrong(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name} | ({} if value is None else {name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("value.deep", None, "'value.deep' is missing"),
        ("state.deep.momentum", torch.zeros(2, 3), "is not of this table"),
        ("value.deep", torch.zeros(2, 4), r"float32 \(2, 3\) is needed"),
        ("value.deep", torch.zeros(3, 3), r"float32 \(2, 3\) is needed"),
        ("value.deep", torch.zeros(2, 3, dtype=torch.float64), r"float32 \(2, 3\) is needed"),
        ("id", torch.tensor([7, 5]), "distinct and in rising order"),
        ("id", torch.tensor([5, 5]), "distinct and in rising order"),
        ("id", torch.tensor([5]), r"\(1, 3\) is needed"),
        ("id", torch.tensor(5), "is needed"),
        ("count", torch.tensor([0, 1]), "count is outside"),
        ("count", torch.tensor([1, 1 << 32]), "count is outside"),
        ("pending.id", torch.tensor([1]), "policy needs"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(name: str, value: Tensor | None, message: str) -> None:
    table, other = make(Always()), make(Always())
    for step in range(2):
        train(table, np.array([5 + step]), np.ones(1, np.float32), step)
    train(other, np.array([1, 2, 3]), np.ones(3, np.float32), 0)
    before = other.state()
    with pytest.raises(CheckpointError, match=message):
        other.load_state(wrong(table.state(), name, value))
    assert_same(other.state(), before)


def test_a_state_of_another_table_is_refused() -> None:
    table = make(Always())
    for other in (make(Always(), dim=4), make(Always(), kind="rowwise_adagrad"), make(Always(), kind="sgd"), make(Frequency(threshold=2))):
        with pytest.raises(CheckpointError):
            other.load_state(table.state())


def test_states_that_do_not_go_together_are_refused() -> None:
    one, other = make(Always()), make(Frequency(threshold=2))
    train(one, np.array([1, 2]), np.ones(2, np.float32), 0)
    with pytest.raises(CheckpointError, match="at least one"):
        reshard([], 2)
    with pytest.raises(CheckpointError, match="different tables"):
        reshard([one.state(), other.state()], 2)
    with pytest.raises(CheckpointError, match="id 1 is held by two"):
        reshard([one.state(), one.state()], 2)


def test_an_empty_table() -> None:
    table = make(Always())
    state = table.state()
    assert (state["id"].shape, state["value.deep"].shape) == ((0,), (0, 3))
    table.load_state(state)
    assert all(len(shard["id"]) == 0 for shard in reshard([state], 2))
    assert len(table) == 0
