"""Training by several processes, as torchrun starts them, against one process."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ninerank.training.run import load_run
from ninerank.training.trainer import Trainer

pytestmark = pytest.mark.distributed

WAIT_S = 180
# 97 rows a batch: neither it nor the last batch divides among the processes.
SHARDED = {
    "data.batch_size": 97,
    "model.mlp": {"hidden": [16, 8]},
    "optimizer.sparse": {"kind": "rowwise_adagrad", "lr": 0.1},
    "schedule.clip_norm": 0.5,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_last": 20,
    "sharding": {"tables": {"item": "row_wise", "user": "column_wise", "tags": "data_parallel"}},
}

# Item and tags are dynamic, user and price are not: rows come by frequency, go by age and beyond a capacity.
DYNAMIC = {
    **{key: value for key, value in SHARDED.items() if key != "sharding"},
    "spec.features.1.encoding": {"kind": "dynamic"},
    "spec.features.2.encoding": {"kind": "dynamic"},
    "embedding.dynamic": {"reserve_rows": 1024},
    "embedding.tables.item": {
        "reserve_rows": 1024,
        "admission": {"kind": "frequency", "threshold": 3},
        "eviction": [{"kind": "capacity", "max_rows": 27, "by": "lru"}],
    },
}
# Of a process's own map and memory.
OWN_FIGURES = ("num_slots", "load_factor", "num_bytes")


@pytest.fixture
def recipe_path(tmp_path: Path, make_recipe) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe(*(f"{key}={json.dumps(value)}" for key, value in SHARDED.items())).to_yaml())
    return path


@contextmanager
def torchrun(num_processes: int, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The whole run in a process group of its own, which is gone when the block ends."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    process = subprocess.Popen(
        [*launcher, "-m", "ninerank", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_same_course(one: Path, other: Path, tolerance: float) -> None:
    left, right = history(one), history(other)
    assert len(left) == len(right) > 8
    for a, b in zip(left, right, strict=True):
        for key in (key for key in a.keys() - {"samples_per_s"} if not key.endswith(OWN_FIGURES)):
            assert bool(a[key]) == bool(b[key]), key
            # Two scores that nearly tie may change places, which an AUC of few rows shows.
            least = 2e-3 if "auc" in key else 0.0
            if a[key]:
                assert float(b[key]) == pytest.approx(float(a[key]), rel=tolerance, abs=least), (key, a["step"])


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids that torchrun started, in the order of their ranks."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


def wait_for_checkpoint(run: Path, launcher: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not list(run.glob("checkpoints/step-*")):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_two_processes_take_the_course_of_one_and_one_goes_on_where_two_were(recipe_path, make_recipe, tmp_path):
    pytest.importorskip("torchrec", reason="needs torchrec")
    recipe = make_recipe(*(f"{key}={json.dumps(value)}" for key, value in SHARDED.items()))
    alone = Trainer(recipe, tmp_path / "one").fit()
    with torchrun(2, recipe_path, "--out", tmp_path / "two") as launcher:
        said = launcher.communicate(timeout=WAIT_S)[0]
    assert launcher.returncode == 0, said[-4000:]
    assert "tables over 2 processes" in said
    assert "load of processes" in said
    assert_same_course(tmp_path / "one", tmp_path / "two", 1e-5)

    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert together["processes"] == 2
    for key in ("steps", "samples", "parameters", "best_epoch"):
        assert together[key] == alone[key], key
    for split in ("valid", "test"):
        assert together[split] == pytest.approx(alone[split], rel=1e-5, abs=2e-3)
    one, two = (load_run(tmp_path / name).model.state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)

    resumed = Trainer(recipe, tmp_path / "two", resume="step-10")
    assert resumed.progress.step == 10
    resumed.fit()
    assert_same_course(tmp_path / "one", tmp_path / "two", 1e-5)


def test_dynamic_tables_take_the_course_of_one_process_and_one_goes_on(make_recipe, tmp_path):
    pytest.importorskip("torchrec", reason="needs torchrec")
    recipe = make_recipe(*(f"{key}={json.dumps(value)}" for key, value in DYNAMIC.items()))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    alone = Trainer(recipe, tmp_path / "one").fit()
    tiered = ("--set", "embedding.tiers={user: {cache_rows: 13}}")  # the same numbers, and checkpoints
    with torchrun(2, tmp_path / "recipe.yaml", "--out", tmp_path / "two", *tiered) as launcher:
        said = launcher.communicate(timeout=WAIT_S)[0]
    assert launcher.returncode == 0, said[-4000:]
    assert "by_id" in said
    assert "tiered" in said
    assert_same_course(tmp_path / "one", tmp_path / "two", 1e-5)

    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert together["tables"]["table.user.misses"] > 0
    assert together["tables"]["table.item.evicted"] > 0
    for key, value in alone["tables"].items():
        assert key.endswith(OWN_FIGURES) or together["tables"][key] == pytest.approx(value), key
    assert together["test"] == pytest.approx(alone["test"], rel=1e-5, abs=2e-3)
    one, two = (load_run(tmp_path / name).model.state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert len(one["embedding.managed.item.id"]) > 5
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)

    Trainer(recipe, tmp_path / "two", resume="step-10").fit()
    assert_same_course(tmp_path / "one", tmp_path / "two", 1e-5)


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_dynamic_tables_and_exports(make_recipe, tmp_path):
    pytest.importorskip("torchrec", reason="needs torchrec")
    from ninerank import Engine
    from ninerank.features.reader import Reader
    from ninerank.predictor.bundle import export_bundle

    recipe = make_recipe(*(f"{key}={json.dumps(value)}" for key, value in {**DYNAMIC, "optimizer.sparse": {"kind": "adam"}}.items()))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    Trainer(recipe, tmp_path / "one").fit()
    with torchrun(4, tmp_path / "recipe.yaml", "--out", tmp_path / "many", "--set", "schedule.epochs=1") as launcher:
        said = launcher.communicate(timeout=WAIT_S)[0]
    assert launcher.returncode == 0, said[-4000:]
    for processes, step, epochs, tiers in ((2, "step-5", 2, {"user": {"cache_rows": 13}}), (1, "step-15", 2, {}), (2, "step-15", 3, {})):
        settings = (f"schedule.epochs={epochs}", f"embedding.tiers={json.dumps(tiers)}")
        arguments = ("--out", tmp_path / "many", "--resume-from", step, *(part for each in settings for part in ("--set", each)))
        with torchrun(processes, *arguments) as launcher:
            said = launcher.communicate(timeout=WAIT_S)[0]
        assert launcher.returncode == 0, said[-4000:]
    assert_same_course(tmp_path / "one", tmp_path / "many", 1e-5)
    run = load_run(tmp_path / "many")
    golden = next(Reader([Path(recipe.data.dir) / "valid.parquet"], spec=run.spec, batch_size=64).epoch(0))
    export_bundle(run.model, run.spec, golden, tmp_path / "bundle", model_name="ctr", version="1")
    other = load_run(tmp_path / "one")
    export_bundle(other.model, other.spec, golden, tmp_path / "other", model_name="ctr", version="1")
    ours, theirs = (torch.as_tensor(Engine.load(tmp_path / name).score(golden)) for name in ("bundle", "other"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_signal_to_one_process_stops_all_after_a_checkpoint(recipe_path, tmp_path):
    pytest.importorskip("torchrec", reason="needs torchrec")
    run = tmp_path / "run"
    with torchrun(2, recipe_path, "--out", run, "--set", "schedule.epochs=2000", "--set", "checkpoint.every_steps=null") as launcher:
        wait_for_checkpoint(run, launcher)
        os.kill(workers(launcher)[1], signal.SIGTERM)
        said = launcher.communicate(timeout=WAIT_S)[0]
    assert launcher.returncode != 0
    assert "go on with: ninerank train --resume" in said
    assert "Traceback (most recent call last)" not in said.partition("go on with")[0]
    stopped = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert f"saved {run}/checkpoints/step-{stopped}" in said


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_a_message(recipe_path, tmp_path):
    pytest.importorskip("torchrec", reason="needs torchrec")
    run = tmp_path / "run"
    with torchrun(2, recipe_path, "--out", run, "--set", "schedule.epochs=2000") as launcher:
        wait_for_checkpoint(run, launcher)
        os.kill(workers(launcher)[1], signal.SIGKILL)
        said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode != 0
    assert "error: process 0: another process ended or stopped answering" in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dense", "three"])
def test_dense_tables_and_three_processes_take_the_course_of_one(make_recipe, tmp_path, mode):
    overrides: dict[str, Any] = {**SHARDED, "optimizer.sparse": {"kind": "adam", "lr": 0.02}}
    if mode == "dense":
        overrides |= {"embedding": {"mode": "dense", "l2": 0.001}, "sharding": {}}
    else:
        pytest.importorskip("torchrec", reason="needs torchrec")
        overrides |= {"sharding": {"default": "row_wise"}}
    recipe = make_recipe(*(f"{key}={json.dumps(value)}" for key, value in overrides.items()))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    Trainer(recipe, tmp_path / "one").fit()
    with torchrun(2 if mode == "dense" else 3, path, "--out", tmp_path / "many") as launcher:
        said = launcher.communicate(timeout=WAIT_S)[0]
    assert launcher.returncode == 0, said[-4000:]
    assert_same_course(tmp_path / "one", tmp_path / "many", 1e-5)


def test_a_wrong_environment_is_named(monkeypatch):
    from ninerank.device import Device
    from ninerank.errors import DeviceError
    from ninerank.training.processes import Processes

    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="RANK='first' in the environment is no number"), Processes.joined(Device.resolve("cpu"), 1.0):
        pass


def test_one_process_of_torchrun_needs_no_group(monkeypatch):
    from ninerank.device import Device
    from ninerank.training.processes import Processes

    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    with Processes.joined(Device.resolve("cpu"), 1.0) as processes:
        assert processes.is_first
        assert processes.sum(2.0, 3.0) == [2.0, 3.0]
        assert processes.gather("x") == ["x"]
        assert not torch.distributed.is_initialized()
