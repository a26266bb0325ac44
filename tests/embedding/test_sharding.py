"""Sharded tables against one process: real processes over gloo, each job in one set of them since they start slowly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchrec", reason="needs torchrec")
pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("sharding_job.py")
RunJob = Callable[..., dict[str, Any]]
RULES = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")
KINDS = ("table_wise", "row_wise", "column_wise", "data_parallel")


@pytest.fixture(scope="module")
def compared(run_job: RunJob) -> dict[str, Any]:
    return run_job(JOB, "pair")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(compared: dict[str, Any], kind: str, rule: str) -> None:
    found = compared[f"{kind} {rule}"]
    assert found["loss"] <= 1e-5  # relative, the largest of 50 steps
    assert found["norm"] <= 1e-5
    assert found["values"] <= 1e-5
    assert found["state"] <= 1e-5
    assert kind in found["kinds"]


def test_kinds_can_be_mixed(compared: dict[str, Any]) -> None:
    found = compared["mixed rowwise_adagrad"]
    assert {"row_wise", "column_wise", "data_parallel"} <= set(found["kinds"])
    assert max(found["loss"], found["values"], found["state"]) <= 1e-5


def test_our_kernels_ran_inside_torchrec(compared: dict[str, Any]) -> None:
    counts = compared["row_wise sgd"]["dispatches"]
    assert all(name.endswith(".numba") for name in counts)
    # Per step a lookup of the tables that are only pooled, and one for each group of those that a sequence looks into.
    assert counts["embedding_bag.numba"] >= 50
    assert counts["embedding_sequence.numba"] == 100
    assert counts["embedding_update.numba"] >= 100


@pytest.mark.slow
def test_three_processes_and_tables_of_fewer_rows(run_job: RunJob) -> None:
    found = run_job(JOB, "uneven", world_size=3)
    for kind in ("row_wise", "data_parallel"):
        assert max(found[kind].values()) <= 1e-5


def test_half_precision_on_the_way_stays_within_its_bound(compared: dict[str, Any]) -> None:
    found = compared["quantised"]
    assert 1e-7 < found["row_wise fp16"] < 1e-3
    assert 2 * found["row_wise fp16"] < found["row_wise bf16"] < 5e-3  # three bits fewer
    assert 1e-5 < found["table_wise bf16"] < 5e-3


def test_every_process_refuses_what_cannot_be(compared: dict[str, Any]) -> None:
    for said in compared["refused"]["by rank"]:
        assert "unknown table 'itme'; did you mean 'item'?" in said["unknown table"]
        assert "'histori' is no feature with a table; did you mean 'history'?" in said["unknown feature"]
        assert "it has no 'adam' that is ours; it has sgd, adagrad, rowwise_adagrad" in said["fbgemm adam"]
        assert "does not take optimizer.sparse.weight_decay = 0.01" in said["fbgemm decay"]
        assert "is column-wise, and its row-wise Adagrad takes the mean square of each part" in said["fbgemm rows"]
        assert "no schedule.clip_norm" in said["fbgemm clip"]
        assert "9 columns (group 'deep') do not divide among 2 processes" in said["columns"]
        assert said["no memory"].startswith("DeviceError: sharding: ")


def test_fbgemm_is_the_kernel_that_ran_and_trains_as_ours(compared: dict[str, Any]) -> None:
    check_fbgemm(compared["fbgemm"], "row_wise")


@pytest.mark.slow
def test_fbgemm_over_every_kind(run_job: RunJob) -> None:
    found = run_job(JOB, "fbgemm")
    for kind in ("table_wise", "row_wise", "column_wise"):
        check_fbgemm(found, kind)
    for rule in ("sgd", "adagrad"):
        counts = found[f"mixed plain {rule}"]["dispatches"]
        assert counts["embedding_bag.numba"] >= 40  # a table that all processes copy stays with our kernels too
        assert counts["embedding_sequence.fbgemm"] == 20
    check_fbgemm(run_job(JOB, "fbgemm", "row_wise", world_size=3), "row_wise")


def check_fbgemm(found: dict[str, Any], kind: str) -> None:
    for name, own in found.items():
        if name.startswith(kind):
            assert max(own["loss"], own["values"], own["state"]) <= 1e-5, name
            # 20 steps; the group of dim 1 stays with our kernels: FBGEMM takes columns in fours. Table-wise, a process may hold it alone.
            counts = own["dispatches"]
            if kind != "table_wise":
                for operator in ("embedding_bag", "embedding_sequence"):
                    assert counts[f"{operator}.fbgemm"] == counts[f"{operator}.numba"] == 20, name
                assert counts["embedding_update.numba"] == 40, name
