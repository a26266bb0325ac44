"""Dynamic and tiered tables over several processes against one: real processes over gloo, which start slowly: all in one set of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchrec", reason="needs torchrec")
pytestmark = pytest.mark.distributed

JOB = Path(__file__).with_name("dynamic_job.py")
RunJob = Callable[..., dict[str, Any]]
CASES = ("rowwise_adagrad always", "adam always", "adagrad admitted", "ftrl evicted")


@pytest.fixture(scope="module")
def found(run_job: RunJob, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job(JOB, "pair", str(tmp_path_factory.mktemp("tiers")))


def check(case: dict[str, Any]) -> None:
    assert case["loss"] <= 1e-5  # relative, the largest of 50 steps
    assert case["norm"] <= 1e-5
    assert case["tables"] <= 1e-5  # ids, counts, ages and what admission holds are equal
    for name, (ours, theirs) in case["figures"].items():
        assert ours == pytest.approx(theirs, rel=1e-12, nan_ok=True), name
    if not any(ours for name, (ours, _) in case["figures"].items() if name.endswith(".evicted")):  # rows that are free count too
        assert case["parameters"][0] == case["parameters"][1]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(found: dict[str, Any], case: str) -> None:
    check(found[case])
    assert bool(found[case]["kinds"]) == case.endswith("always")  # the others have no static table


def test_rows_come_and_go_as_in_one_process(found: dict[str, Any]) -> None:
    admitted, evicted = found["adagrad admitted"]["figures"], found["ftrl evicted"]["figures"]
    assert admitted["table.item.rejected"][0] > 50
    assert admitted["table.tag.rejected"][0] > 0
    for table in ("item", "tag"):
        assert evicted[f"table.{table}.evicted"][0] > 20
    assert 0 < evicted["table.item.size"][0] <= 30


def test_gradients_of_two_batches_add_up(found: dict[str, Any]) -> None:
    assert found["accumulated"]["loss"] <= 1e-5


def test_half_precision_on_the_way_stays_within_its_bound(found: dict[str, Any]) -> None:
    exact, short = found["wires"]["none"], found["wires"]["bf16"]
    assert 1e-6 < max(abs(a - b) / abs(b) for a, b in zip(short, exact, strict=True)) < 5e-3
    for wire, bits in (("fp16", 11), ("bf16", 8)):
        assert 2.0 ** -(bits + 2) < found["rounded"][wire] <= 2.0**-bits


def test_tiered_tables_train_as_tables_in_memory(found: dict[str, Any]) -> None:
    for own in found["tiered"].values():
        assert max(own["loss"], own["norm"]) <= 1e-5
        assert own["values"] <= 3e-5  # lazy Adam divides small numbers by small numbers
        assert own["evictions"] > 0
        assert own["parameters"][0] == own["parameters"][1]


def test_a_batch_out_of_turn_is_refused(found: dict[str, Any]) -> None:
    said = found["misuse"]
    assert "the batch that was prepared last" in said["old batch"]
    assert "gradients left" in said["left"]
    assert "a backward pass came after the next batch" in said["late"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rule_policy_and_mixture(run_job: RunJob, world_size: int) -> None:
    for name, case in run_job(JOB, "every", world_size=world_size).items():
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
