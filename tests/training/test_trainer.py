import csv
import json
import math
from pathlib import Path

import pytest
import torch

from ninerank.device import Device
from ninerank.errors import CheckpointError, DataError, DeviceError, SpecError
from ninerank.metrics import auc, logloss
from ninerank.training import sealed
from ninerank.training.checkpoint import BestWeights
from ninerank.training.checkpoint.archive import Archive
from ninerank.training.interrupt import TrainingInterrupted
from ninerank.training.pipeline import Split
from ninerank.training.run import load_run
from ninerank.training.state import reseed
from ninerank.training.trainer import Trainer

MODES = {
    "sparse": ["embedding.mode=sparse", "optimizer.sparse={kind: rowwise_adagrad, lr: 0.1}"],
    "dynamic": [
        "spec.features.0.encoding={kind: dynamic}",
        "spec.features.1.encoding={kind: dynamic}",
        "spec.features.2.encoding={kind: dynamic, seed: 3}",
        "embedding.dynamic={admission: {kind: frequency, threshold: 2}}",
        "embedding.tables.item={eviction: [{kind: capacity, max_rows: 20}], evict_every: 3}",
        "optimizer.sparse={kind: adam, lr: 0.01}",
    ],
    "dense": ["embedding={mode: dense, l2: 0.001}", "schedule.lr={kind: reduce_on_plateau}"],
    "streamed": ["data.cache_bytes=0", "schedule.lr={kind: cosine, warmup_steps: 4}", "data.prefetch=0"],
}


class CrashError(Exception):
    pass


def weights(run: Path) -> dict[str, bytes]:
    """Bytes of the last checkpoint's tensors and of the best weights."""
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    files = {**sealed.verify(last).paths, **{f"best/{name}": path for name, path in sealed.verify(run / "best").paths.items()}}
    return {name: path.read_bytes() for name, path in files.items() if path.suffix == ".safetensors"}


def at_step(trainer: Trainer, step: int, act) -> Trainer:
    inner = trainer.step

    def wrapped(*batches):
        result = inner(*batches)
        if trainer.progress.step + 1 == step:
            act(trainer)
        return result

    trainer.step = wrapped
    return trainer


def interrupt(trainer: Trainer) -> None:
    trainer._interrupts.requested = "SIGINT"


def crash(trainer: Trainer) -> None:
    raise CrashError


def without_times(metrics: dict) -> dict:
    return {
        key: value for key, value in metrics.items() if key not in {"seconds", "samples_per_s", "tables"}
    }  # tables: traffic of this process


@pytest.mark.parametrize("mode", MODES)
def test_stop_and_resume_gives_the_bytes_of_a_run_never_stopped(make_recipe, tmp_path, mode):
    recipe = make_recipe("checkpoint.every_steps=5", *MODES[mode])
    whole = Trainer(recipe, tmp_path / "whole").fit()
    assert whole["steps"] == 24
    again = Trainer(recipe, tmp_path / "again").fit()
    assert without_times(again) == without_times(whole)
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")

    parts = tmp_path / "parts"
    with pytest.raises(TrainingInterrupted, match=r"stopped by SIGINT; saved .*step-3"):
        at_step(Trainer(recipe, parts), 3, interrupt).fit()
    with pytest.raises(CrashError):  # goes back to step 10, in the middle of the second epoch
        at_step(Trainer(recipe, parts, resume=True), 13, crash).fit()
    resumed = Trainer(recipe, parts, resume=True)
    assert (resumed.progress.step, resumed.progress.epoch, resumed.progress.batch) == (10, 1, 2)
    with pytest.raises(TrainingInterrupted):  # the last step of an epoch: what comes next is the evaluation
        at_step(resumed, 16, interrupt).fit()
    torch.manual_seed(999)
    assert without_times(Trainer(recipe, parts, resume=True).fit()) == without_times(whole)
    assert weights(parts) == weights(tmp_path / "whole")
    with (parts / "history.csv").open() as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream)]
    assert steps == sorted(steps)
    assert steps[-1] == 24


def test_generators_of_another_number_of_processes_are_seeded_anew(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("checkpoint.every_steps=5", "checkpoint.asynchronous=false")
    with pytest.raises(CrashError):
        at_step(Trainer(recipe, tmp_path / "run"), 7, crash).fit()
    same = Trainer(recipe, tmp_path / "run", resume=True)
    states = [torch.get_rng_state()]
    monkeypatch.setattr(Archive, "world_size", 2)
    for _ in range(2):
        other = Trainer(recipe, tmp_path / "run", resume=True)
        assert other.progress == same.progress
        states.append(torch.get_rng_state())
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[0], states[1])
    assert len({reseed(seed, step, rank) for seed in (1, 2) for step in (1, 2) for rank in (0, 1)}) == 8


def test_interrupt_during_validation_is_met(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("schedule.epochs=1")
    whole = Trainer(recipe, tmp_path / "whole").fit()
    trainer = Trainer(recipe, tmp_path / "parts")
    monkeypatch.setattr(trainer, "_end_epoch", lambda end=trainer._end_epoch: (interrupt(trainer), end()))
    with pytest.raises(TrainingInterrupted):
        trainer.fit()
    assert not (tmp_path / "parts" / "best").exists()
    assert without_times(Trainer(recipe, tmp_path / "parts", resume=True).fit()) == without_times(whole)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_interrupt_during_the_test_saves_nothing_wrong(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("schedule.epochs=2", "schedule.early_stopping.min_delta=1.0")
    whole = Trainer(recipe, tmp_path / "whole").fit()
    assert whole["best_epoch"] == 1  # so that the best weights are not the last ones
    trainer = Trainer(recipe, tmp_path / "parts")
    monkeypatch.setattr(trainer, "_report", lambda seconds, report=trainer._report: (interrupt(trainer), report(seconds)))
    with pytest.raises(TrainingInterrupted, match="step-16"):
        trainer.fit()
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert without_times(Trainer(recipe, tmp_path / "parts", resume=True).fit()) == without_times(whole)


def test_a_run_that_saved_nothing_may_start_again(make_recipe, tmp_path):
    with pytest.raises(DataError, match="is missing"):
        Trainer(make_recipe("spec.features.0.column=usr"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert Trainer(make_recipe(), tmp_path / "run").progress.step == 0


def test_another_seed_gives_other_weights(make_recipe, tmp_path):
    for seed in (1, 2):
        Trainer(make_recipe(f"seed={seed}", "schedule.epochs=1"), tmp_path / str(seed)).fit()
    assert weights(tmp_path / "1") != weights(tmp_path / "2")


def test_it_learns_and_says_what_it_measured(make_recipe, tmp_path):
    recipe = make_recipe("schedule.epochs=12", "model.mlp.dropout=0")
    trainer = Trainer(recipe, tmp_path / "run")
    metrics = trainer.fit()
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert min(metrics["valid"]["auc"], metrics["test"]["auc"]) > 0.65
    assert {"gauc", "logloss", "pcoc", "positive_rate"} <= set(metrics["test"])
    assert metrics["test"]["num_rows"] == 250
    assert metrics["samples"] == metrics["epochs"] * 700
    assert metrics["samples_per_s"] > 0

    run = load_run(tmp_path / "run")
    assert run.spec == trainer.spec
    assert run.metrics == metrics
    assert not run.model.training
    split = Split(recipe.data.files("test"), recipe.data, run.spec, embedding=run.model.embedding, training=False, seed=0)
    with torch.no_grad():
        rows = [(batch.label_BT[:, 0], torch.sigmoid(run.model(batch)[:, 0]), batch.weight_B) for batch in split.epoch(0)]
    label, score, weight = (torch.cat(column).double().numpy() for column in zip(*rows, strict=True))
    assert auc(label, score, weight) == pytest.approx(metrics["test"]["auc"], abs=1e-12)
    assert logloss(label, score, weight) == pytest.approx(metrics["test"]["logloss"], abs=1e-9)


def test_run_directory(make_recipe, tmp_path):
    Trainer(make_recipe(), tmp_path / "run").fit()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("recipe.yaml", "spec.json", "versions.json", "history.csv", "metrics.json", "checkpoints", "best")
    }
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["versions"]["torch"] == torch.__version__
    assert versions["device"] == "cpu"
    with (tmp_path / "run" / "history.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [3, 6, 8, 8, 9, 12, 15, 16, 16, 18, 21, 24, 24]
    assert all(math.isfinite(float(row["loss"])) for row in rows if row["loss"])
    assert sum(bool(row["valid_auc"]) for row in rows) == 3


def test_early_stopping_keeps_the_best_epoch(make_recipe, tmp_path, monkeypatch):
    values = iter([0.6, 0.8, 0.7, 0.8, 0.9])
    trainer = Trainer(make_recipe("schedule.epochs=9", "schedule.lr={kind: reduce_on_plateau, factor: 0.5}"), tmp_path / "run")
    kept = {}
    inner = trainer._measure

    def measure(split, label):
        if label == "test":
            return inner(split, label)
        kept[trainer.progress.epoch + 1] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        return {"auc": next(values), "logloss": 0.5}

    monkeypatch.setattr(trainer, "_measure", measure)
    metrics = trainer.fit()
    assert (metrics["epochs"], metrics["best_epoch"], metrics["valid"]["auc"]) == (4, 2, 0.8)
    assert trainer._lr == 0.01 * 0.5
    best = sealed.verify(tmp_path / "run" / "best")
    assert best.extra["epoch"] == 2
    saved = BestWeights(tmp_path / "run" / "best", spec_digest=trainer.spec.digest).load()
    assert saved.keys() == kept[2].keys()
    assert all(torch.equal(saved[name], kept[2][name]) for name in saved)


def test_max_steps_ends_within_an_epoch_and_evaluates(make_recipe, tmp_path):
    recipe = make_recipe("schedule.max_steps=11")
    metrics = Trainer(recipe, tmp_path / "run").fit()
    assert (metrics["steps"], metrics["epochs"]) == (11, 2)
    assert Trainer(recipe, tmp_path / "run", resume=True).fit()["test"] == metrics["test"]


def test_a_finished_run_can_go_on_for_more_epochs(make_recipe, tmp_path):
    whole = Trainer(make_recipe("schedule.epochs=4"), tmp_path / "whole").fit()
    Trainer(make_recipe("schedule.epochs=2"), tmp_path / "run").fit()
    assert without_times(Trainer(make_recipe("schedule.epochs=4"), tmp_path / "run", resume=True).fit()) == without_times(whole)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_run_is_not_overwritten_unawares(make_recipe, tmp_path):
    recipe = make_recipe("schedule.epochs=1")
    Trainer(recipe, tmp_path / "run").fit()
    with pytest.raises(SpecError, match="holds a run already.*--resume.*--overwrite"):
        Trainer(recipe, tmp_path / "run")
    Trainer(recipe, tmp_path / "run", overwrite=True).fit()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("my only copy")
    for overwrite in (False, True):
        with pytest.raises(SpecError, match="exists and is no run directory"):
            Trainer(recipe, tmp_path / "other", overwrite=overwrite)
    assert (tmp_path / "other" / "thesis.tex").exists()


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_fails_before_training_leaves_nothing_behind(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe("schedule.epochs=1")
    damaged = make_recipe("spec.features.0.column=nowhere")
    with pytest.raises(DataError, match="nowhere"):
        Trainer(damaged, tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()
    with pytest.raises(CrashError):
        at_step(Trainer(recipe, tmp_path / "deep" / "run"), 1, crash).fit()
    assert not (tmp_path / "deep").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nowhere"):
        Trainer(damaged, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []

    Trainer(recipe, tmp_path / "run").fit()
    before = files(tmp_path / "run")
    with pytest.raises(DataError, match="nowhere"):
        Trainer(damaged, tmp_path / "run", overwrite=True)
    assert files(tmp_path / "run") == before
    with pytest.raises(CheckpointError):
        Trainer(recipe, tmp_path / "run", resume="step-999")
    assert files(tmp_path / "run") == before
    trainer = Trainer(recipe, tmp_path / "run", overwrite=True)
    assert not any(path.name == ".replaced" for path in (tmp_path / "run").iterdir())
    with pytest.raises(CrashError):
        at_step(trainer, 2, crash).fit()
    assert (tmp_path / "run" / "recipe.yaml").exists()


def test_resume_needs_the_same_recipe_and_data(make_recipe, tmp_path, log_dir):
    with pytest.raises(CheckpointError, match=r"is no run directory, recipe\.yaml is missing"):
        Trainer(make_recipe(), tmp_path / "nothing", resume=True)
    Trainer(make_recipe("schedule.epochs=1"), tmp_path / "run").fit()
    with pytest.raises(CheckpointError, match=r"optimizer\.lr = 0\.01, the recipe now says 0\.5"):
        Trainer(make_recipe("optimizer.lr=0.5"), tmp_path / "run", resume=True)
    recipe = make_recipe("schedule.epochs=1")
    shrunk = tmp_path / "shrunk"
    shrunk.mkdir()
    for split, source in (("train", "valid"), ("valid", "valid"), ("test", "test")):
        (shrunk / f"{split}.parquet").write_bytes((log_dir / f"{source}.parquet").read_bytes())
    with pytest.raises(CheckpointError, match="'num_rows': 700.*'num_rows': 300"):
        Trainer(recipe.override([f"data.dir={shrunk}"]), tmp_path / "run", resume=True)


def test_resume_refuses_another_fitted_spec_and_damaged_files(make_recipe, tmp_path):
    recipe = make_recipe("schedule.epochs=2", "checkpoint.every_steps=8")
    run = tmp_path / "run"
    first = Trainer(recipe, run)
    first.fit()
    spec = (run / "spec.json").read_text()
    (run / "spec.json").write_text(spec.replace('"u3"', '"u99"'))
    with pytest.raises(CheckpointError, match=f"made with spec {first.spec.digest}, this run's spec is [0-9a-f]{{64}}"):
        Trainer(recipe, run, resume=True)
    (run / "spec.json").write_text(spec)
    path = run / "checkpoints" / "step-16" / "rank-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors: .*--resume-from step-8"):
        Trainer(recipe, run, resume=True)
    assert Trainer(recipe, run, resume="step-8").progress.step == 8
    path = sealed.verify(run / "best").paths["rank-0.safetensors"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{path.name}: has 100 bytes"):
        load_run(run)


def test_divergence_is_an_error_not_a_model(make_recipe, tmp_path):
    recipe = make_recipe("optimizer={kind: sgd, lr: 1.0e+30}", "model.mlp.batch_norm=false")
    with pytest.raises(SpecError, match=r"the loss became (nan|inf) between steps 1 and 3: training diverged; lower optimizer\.lr"):
        Trainer(recipe, tmp_path / "run").fit()


def test_one_class_in_validation_leaves_auc_undefined(make_recipe, tmp_path, log_dir):
    from pyarrow import compute, parquet

    table = parquet.read_table(log_dir / "valid.parquet")
    parquet.write_table(table.filter(compute.equal(table["click"], 0)), tmp_path / "zeros.parquet")
    metrics = Trainer(make_recipe("schedule.epochs=2", f"data.valid={tmp_path}/zeros.parquet"), tmp_path / "run").fit()
    assert metrics["valid"]["auc"] is None
    assert metrics["best_epoch"] == 2


def test_bfloat16(make_recipe, tmp_path):
    recipe = make_recipe("precision=bf16", "schedule.epochs=2")
    if Device.resolve("cpu").autocast_dtype is None:
        with pytest.raises(DeviceError, match="does not multiply bfloat16"):
            Trainer(recipe, tmp_path / "run")
        return
    half = Trainer(recipe, tmp_path / "half").fit()
    full = Trainer(make_recipe("schedule.epochs=2"), tmp_path / "full").fit()
    assert half["valid"]["logloss"] == pytest.approx(full["valid"]["logloss"], abs=0.02)
    assert half["valid"]["logloss"] != full["valid"]["logloss"]


def test_two_tasks(make_recipe, tmp_path):
    recipe = make_recipe("spec.labels=[click, liked]", "loss.task_weights={liked: 0.5}", f"data.dir={two_label_log(make_recipe, tmp_path)}")
    metrics = Trainer(recipe, tmp_path / "run").fit()
    assert metrics["valid"]["auc"] == pytest.approx((metrics["valid"]["click.auc"] + metrics["valid"]["liked.auc"]) / 2)
    with pytest.raises(SpecError, match="'like' is not a label"):
        Trainer(recipe.override(["loss.task_weights={like: 1}"]), tmp_path / "other")


def two_label_log(make_recipe, tmp_path: Path) -> Path:
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    data = make_recipe().data
    for split in ("train", "valid", "test"):
        table = parquet.read_table(data.files(split)[0])
        liked = (np.arange(table.num_rows) % 3 == 0).astype(np.int64)
        parquet.write_table(table.append_column("liked", pa.array(liked)), tmp_path / f"{split}.parquet")
    return tmp_path


def test_unfit_requests_are_refused_before_work(make_recipe, tmp_path):
    with pytest.raises(SpecError, match="'gauc' needs a `group` column"):
        Trainer(make_recipe("spec.group=null", "schedule.early_stopping.metric=gauc"), tmp_path / "run")
    with pytest.raises(DeviceError, match="cuda|npu"):
        Trainer(make_recipe("device=npu:7"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_column_is_named(make_recipe, tmp_path):
    with pytest.raises(DataError, match=r"train\.parquet: column 'usr' is missing; did you mean 'user'\?"):
        Trainer(make_recipe("spec.features.0.column=usr"), tmp_path / "run")


def test_tensorboard_when_asked_for(make_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    Trainer(make_recipe("log.tensorboard=true", "schedule.epochs=1"), tmp_path / "run").fit()
    assert list((tmp_path / "run" / "tensorboard").iterdir())
