"""The fused operator behind a dynamic table, against torch.optim and against the plain-torch rule."""

import numpy as np
import pytest
import torch

from ninerank.embedding.dynamic import DynamicTable, DynamicTableConfig, FusedRule, initial_values
from ninerank.fusion.kernels.embedding_update import FTRL, SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad

OPTIMIZERS: list[RowOptimizer] = [SGD(), Adagrad(initial_accumulator=0.2), RowwiseAdagrad(), Adam(), FTRL(l1=0.01, initial_accumulator=0.1)]
IDS = np.array([5, -5, 1 << 60, 0, 77])


def make(rule: object) -> DynamicTable:
    return DynamicTable("item", {"deep": 4}, DynamicTableConfig(reserve_rows=4, init_std=0.5), seed=0, rule=rule)  # type: ignore[arg-type]


def train(table: DynamicTable, place: np.ndarray, grad_ND: torch.Tensor, step: int) -> None:
    rows = table.lookup(torch.from_numpy(IDS[place]), train=True, step=step)
    (table.rows("deep", rows) * grad_ND).sum().backward()
    table.update()
    table.finish_step(step)


def batches(steps: int = 20) -> list[tuple[np.ndarray, torch.Tensor]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, len(IDS), 9), torch.from_numpy(rng.standard_normal((9, 4)).astype(np.float32))) for _ in range(steps)]


def test_adam_equals_torch_where_every_row_is_touched() -> None:
    table = make(FusedRule(Adam(beta1=0.8), 0.05))
    dense = torch.from_numpy(initial_values(IDS, 4, seed=0, group="deep", table="item", std=0.5)).requires_grad_()
    optimizer = torch.optim.Adam([dense], lr=0.05, betas=(0.8, 0.999))
    everyone = np.arange(len(IDS))
    for step in range(15):
        grad_ND = torch.from_numpy(np.random.default_rng(step).standard_normal((len(IDS), 4)).astype(np.float32))
        train(table, everyone, grad_ND, step)
        dense.grad = grad_ND
        optimizer.step()
    torch.testing.assert_close(table.state()["value.deep"], dense.detach()[np.argsort(IDS)], rtol=1e-5, atol=1e-6)
    assert table.state()["state.deep.step"].tolist() == [15] * len(IDS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.kind)
def test_state_moves_with_the_row_and_starts_afresh(optimizer: RowOptimizer) -> None:
    """Through growth, eviction, reuse of rows and a reload, a row's course is that of an undisturbed table."""
    table, calm = make(FusedRule(optimizer, 0.1)), make(FusedRule(optimizer, 0.1))
    for step, (place, grad_ND) in enumerate(batches()):
        kept = place[place < 3]
        train(table, place, grad_ND, step)
        train(calm, kept, grad_ND[torch.from_numpy(place < 3)], step)
        if step % 3 == 0:
            table.remove(torch.from_numpy(IDS[3:]))
            table.lookup(torch.arange(20) + 1000 * (step + 1), train=True, step=step)
            table.finish_step(step)
        if step == 10:
            state, table = table.state(), make(FusedRule(optimizer, 0.1))
            table.load_state(state)
    state, wanted = table.state(), calm.state()
    own = torch.isin(state["id"], wanted["id"])
    for name, value in wanted.items():
        assert torch.equal(state[name][own], value), name


def test_rows_without_an_id_stay_zero() -> None:
    table = make(FusedRule(Adam(), 0.1))
    rows = table.lookup(torch.tensor([1, 2]), train=True, step=0, missing=torch.tensor([False, True]))
    table.rows("deep", rows).sum().backward()
    table.update()
    assert not table.values("deep")[0].any()
    assert table.storage.states("deep")["step"].tolist() == [0, 1]
