"""Dynamic and tiered tables through a checkpoint: both go on as if nothing had been."""

from pathlib import Path

import pytest
import torch

from ninerank.embedding.dynamic import DynamicTable, DynamicTableConfig
from ninerank.embedding.managed import ManagedTable
from ninerank.embedding.tiers import TierConfig, TieredTable
from ninerank.errors import CheckpointError
from ninerank.fusion.kernels.embedding_update import row_optimizers
from ninerank.training.checkpoint import CheckpointStore
from ninerank.training.checkpoint.managed import managed_tree, read_managed

DIMS = {"deep": 4, "linear": 1}


def make(kind: str, folder: Path) -> ManagedTable:
    table: ManagedTable
    if kind == "dynamic":
        table = DynamicTable("item", DIMS, DynamicTableConfig(reserve_rows=256), seed=1)
    else:
        directory = {"directory": str(folder)} if kind == "disk" else {}
        table = TieredTable("item", 50, DIMS, TierConfig.parse({"cache_rows": 20, "placement": kind, **directory}, "tier"), seed=1)
    table.train_with(row_optimizers()["adagrad"](), 0.1)
    return table


def train(table: ManagedTable, steps: range) -> None:
    for step in steps:
        rows = table.prepare(torch.arange(step, step + 15) % 50, step=step)
        for group in DIMS:
            table.rows(group, rows).square().sum().backward()
        table.update()
        table.finish_step(step)


@pytest.mark.parametrize("kind", ["dynamic", "host", "disk"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_table_goes_on_from_a_checkpoint(tmp_path, kind, asynchronous):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2, spec_digest="d", asynchronous=asynchronous)
    table = make(kind, tmp_path / "one")
    train(table, range(8))
    store.save(8, managed_tree({"item": table}), {})
    train(table, range(8, 16))
    checkpoint = store.load()
    assert checkpoint is not None
    other = make(kind, tmp_path / "other")
    train(other, range(30, 33))
    read_managed(checkpoint, {"item": other})
    train(other, range(8, 16))
    wanted, found = table.state(), other.state()
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_a_table_that_is_not_there_or_of_another_kind(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2, spec_digest="d")
    store.save(1, managed_tree({"item": make("dynamic", tmp_path)}), {})
    store.save(2, managed_tree({"item": make("host", tmp_path)}), {})
    dynamic, tiered = store.load("step-1"), store.load("step-2")
    assert dynamic is not None
    assert tiered is not None
    for kind in ("dynamic", "host"):
        with pytest.raises(CheckpointError, match=r"holds no 'managed\.user' kept by id"):
            read_managed(dynamic, {"user": make(kind, tmp_path)})
    with pytest.raises(CheckpointError, match=r"step-2: does not fit .*'managed\.item\.state\.deep\.sum'"):
        read_managed(tiered, {"item": make("dynamic", tmp_path)})
    with pytest.raises(CheckpointError, match="'count' is not of this table"):
        read_managed(dynamic, {"item": make("host", tmp_path)})
