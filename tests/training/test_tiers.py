"""Recipes with tiered tables: the runs of tables in memory, wherever their rows lie."""

import threading
from pathlib import Path

import pytest
import torch

from ninerank.errors import DataError, SpecError
from ninerank.features.reader import Reader
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.training import sealed
from ninerank.training.checkpoint import BestWeights
from ninerank.training.interrupt import TrainingInterrupted
from ninerank.training.parallel import plan_for
from ninerank.training.pipeline import Split
from ninerank.training.run import RunDir, load_run
from ninerank.training.scoring import measure
from ninerank.training.trainer import Trainer

# Without batch normalisation, before which a bias has no gradient but rounding.
SETTINGS = (
    *("data.batch_size=12", "spec.features.1.encoding.num_buckets=1000", "model.mlp.batch_norm=false", "schedule.clip_norm=1.0"),
    *("schedule.epochs=2", "checkpoint.every_steps=20", "data.train=valid.parquet", "optimizer.sparse={kind: rowwise_adagrad, lr: 0.1}"),
)
TINY = 29  # the 30 items of the log do not fit; those of any batch do


class CrashError(Exception):
    pass


def tiers(placement: str, directory: Path, *, item: int = TINY, tags: int = 7) -> str:
    """Override that puts two tables in tiers, one of them read ahead."""
    place = f"placement: disk, directory: {directory}" if placement == "disk" else "placement: host"
    return f"embedding.tiers={{item: {{{place}, cache_rows: {item}}}, tags: {{{place}, cache_rows: {tags}, prefetch: false}}}}"


def contents(run: Path) -> dict[str, bytes]:
    """Bytes of the last checkpoint's tensors and of the best weights."""
    last = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    files = {**sealed.verify(last).paths, **{f"best/{name}": path for name, path in sealed.verify(run / "best").paths.items()}}
    return {name: path.read_bytes() for name, path in files.items() if path.suffix == ".safetensors"}


def best(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(BestWeights(trainer.run.best, spec_digest=trainer.spec.digest).load())


def stop_at(trainer: Trainer, step: int, *, crash: bool = False) -> Trainer:
    inner = trainer.step

    def wrapped(*batches):
        result = inner(*batches)
        if trainer.progress.step + 1 == step:
            if crash:
                raise CrashError
            trainer._interrupts.requested = "SIGINT"
        return result

    trainer.step = wrapped
    return trainer


def assert_near(met: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert met.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(met[name], value, rtol=0.0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_trains_evaluates_exports_and_resumes(make_recipe, tmp_path, placement):
    recipe = make_recipe(*SETTINGS, tiers(placement, tmp_path / "scratch"))
    untiered = Trainer(make_recipe(*SETTINGS), tmp_path / "untiered")
    plain = untiered.fit()
    trainer = Trainer(recipe, tmp_path / "whole")
    collection = trainer.model.embedding
    assert set(collection.tiers) == {"item", "tags"} == set(collection.managed)
    assert not {"item", "tags"} & set(collection.layout.names)
    assert trainer.store.asynchronous == (placement == "host")
    whole = trainer.fit()
    assert whole["tables"]["table.item.evictions"] > 0
    assert whole["tables"]["table.tags.evictions"] == 0
    for split in ("valid", "test"):
        assert whole[split]["logloss"] == pytest.approx(plain[split]["logloss"], abs=1e-6)
        assert whole[split]["num_rows"] == plain[split]["num_rows"]
    assert whole["parameters"] == plain["parameters"]
    assert_near(best(trainer), best(untiered))

    large = make_recipe(*SETTINGS, tiers("host", tmp_path, item=1000, tags=1000))
    Trainer(large, tmp_path / "large").fit()
    assert contents(tmp_path / "large") == contents(tmp_path / "whole")

    parts = tmp_path / "parts"
    with pytest.raises(TrainingInterrupted, match="step-13"):
        stop_at(Trainer(recipe, parts), 13).fit()
    with pytest.raises(CrashError):
        stop_at(Trainer(recipe, parts, resume=True), 43, crash=True).fit()
    resumed = Trainer(recipe, parts, resume=True)
    assert resumed.progress.step == 40
    assert resumed.fit()["test"] == whole["test"]
    assert contents(parts) == contents(tmp_path / "whole")

    run = load_run(parts)
    assert not run.model.embedding.managed
    split = Split(recipe.data.files("test"), recipe.data, run.spec, embedding=run.model.embedding, training=False, seed=0)
    again = measure(run.model, split.epoch(0), run.spec.labels, device=torch.device("cpu"))
    assert again["logloss"] == pytest.approx(whole["test"]["logloss"], abs=1e-6)
    golden = next(Reader(recipe.data.files("test"), format="auto", spec=run.spec, batch_size=20).epoch(0))
    export_bundle(run.model, run.spec, golden, tmp_path / "bundle", model_name="small", version="1")
    assert Bundle.load(tmp_path / "bundle").tables["deep"].shape[0] == run.model.embedding.layout.total_rows


@pytest.mark.parametrize("first_is_tiered", [True, False])
def test_checkpoints_load_with_and_without_tiers(make_recipe, tmp_path, first_is_tiered):
    recipes = [make_recipe(*SETTINGS, tiers("disk", tmp_path / "scratch")), make_recipe(*SETTINGS)]
    first, second = recipes if first_is_tiered else recipes[::-1]
    whole = Trainer(second, tmp_path / "whole")
    whole.fit()
    run = tmp_path / "run"
    with pytest.raises(TrainingInterrupted):
        stop_at(Trainer(first, run), 6).fit()
    saved = Trainer(first, run, resume=True)
    went_on = Trainer(second, run, resume=True)
    before, after = (
        {**t.model.state_dict(), **{f"optimizer.{key}": value for key, value in t.optimizer.sparse.state_dict().items()}}
        for t in (saved, went_on)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved.close()
    went_on.fit()
    assert_near(best(went_on), best(whole))
    assert RunDir(run).recipe().embedding.tiers == second.embedding.tiers
    with pytest.raises(TrainingInterrupted):  # and back again
        stop_at(Trainer(first.override(["schedule.epochs=3"]), run, resume=True), 55).fit()


def test_tables_in_tiers_alone_and_beside_dynamic_ones(make_recipe, tmp_path):
    settings = (*SETTINGS, "schedule.epochs=1", "spec.features.0.encoding={kind: dynamic}", tiers("host", tmp_path))
    for name in ("whole", "again"):
        trainer = Trainer(make_recipe(*settings), tmp_path / name)
        assert set(trainer.model.embedding.by_id) == {"user"}
        assert trainer.fit()["test"]["num_rows"] == 250
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        stop_at(Trainer(make_recipe(*settings), tmp_path / "parts"), 3).fit()
    Trainer(make_recipe(*settings), tmp_path / "parts", resume=True).fit()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert set(load_run(tmp_path / "parts").model.embedding.managed) == {"user"}
    every = "{user: {cache_rows: 99}, item: {cache_rows: 99}, tags: {cache_rows: 99}, price: {cache_rows: 99}}"
    alone = Trainer(make_recipe("schedule.epochs=1", f"embedding.tiers={every}"), tmp_path / "alone")
    assert alone.model.embedding.layout.names == ()
    alone.fit()
    assert load_run(tmp_path / "alone").model.embedding.layout.total_rows > 40


def test_the_next_batch_is_announced_and_max_steps_holds(make_recipe, tmp_path):
    recipe = make_recipe(*SETTINGS, "schedule.max_steps=30", tiers("host", tmp_path))
    trainer = Trainer(recipe, tmp_path / "run")
    announced, prepared = [], []
    table = trainer.model.embedding.tiers["item"]
    prefetch, prepare = table.prefetch, table.prepare
    table.prefetch = lambda ids: (announced.append(ids), prefetch(ids))
    table.prepare = lambda ids, *, step=None: (prepared.append(ids) if step is not None else None, prepare(ids, step=step))[1]
    metrics = trainer.fit()
    assert metrics["steps"] == 30
    assert len(announced) == 24 + 5  # of 25 batches all but the first; after the last step one in vain
    following = [prepared[step] for step in (*range(1, 25), *range(26, 30))]
    assert all(torch.equal(met, wanted) for met, wanted in zip(announced, following, strict=False))
    assert metrics["tables"]["table.item.prefetched"] > 0
    assert metrics["tables"]["table.tags.prefetched"] == 0


def test_threads_and_files_end_with_the_run(make_recipe, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    monkeypatch.setenv("SCRATCH", str(scratch))
    recipe = make_recipe("schedule.epochs=1", tiers("disk", Path("$SCRATCH"), item=40))
    Trainer(recipe, tmp_path / "one").fit()
    assert not list(scratch.iterdir())
    assert RunDir(tmp_path / "one").recipe().embedding.tiers["item"].directory == str(scratch)
    trainer = Trainer(recipe, tmp_path / "two")
    with pytest.raises(SpecError, match="in use by another process or table"):  # two runs in one place
        Trainer(recipe, tmp_path / "three")
    with pytest.raises(CrashError):
        stop_at(trainer, 2, crash=True).fit()
    assert not list(scratch.iterdir())
    (scratch / "tags.tier").mkdir()
    (scratch / "tags.tier" / "thesis.tex").write_text("my only copy")
    with pytest.raises(SpecError, match=r"holds 'thesis\.tex'"):
        Trainer(recipe, tmp_path / "four")
    assert [path.name for path in scratch.iterdir()] == ["tags.tier"]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ninerank-tier")]


def test_wrong_settings_are_refused(make_recipe, tmp_path):
    for override, message in {
        "embedding.tiers={itm: {cache_rows: 9}}": "embedding.tiers: unknown table 'itm'; did you mean 'item'",
        "embedding={mode: dense, tiers: {item: {cache_rows: 9}}}": "needs mode 'sparse'",
    }.items():
        with pytest.raises(SpecError, match=message):
            Trainer(make_recipe(override), tmp_path / "run")
    dynamic = make_recipe("spec.features.0.encoding={kind: dynamic}", "embedding.tiers={user: {cache_rows: 9}}")
    with pytest.raises(SpecError, match="'user' is a dynamic table"):
        Trainer(dynamic, tmp_path / "run")
    with pytest.raises(SpecError, match="cache_rows"):
        make_recipe("embedding.tiers={item: {placement: host}}")
    with pytest.raises(SpecError, match="needs a directory"):
        make_recipe("embedding.tiers={item: {placement: disk, cache_rows: 9}}")
    with pytest.raises(DataError, match="table 'item': a batch has .* distinct ids, its cache 5 rows.*smaller batches"):
        Trainer(make_recipe("embedding.tiers={item: {cache_rows: 5}}"), tmp_path / "small").fit()


def test_tiers_are_planned_in_blocks_of_rows(make_recipe):
    pytest.importorskip("torchrec", reason="needs torchrec")
    plan = plan_for(make_recipe("embedding.tiers={item: {cache_rows: 40}}"), 2)
    assert {(each.table, each.kind, each.num_rows) for each in plan.apart} == {("item", "tiered", 41)}
    assert "item" not in {placed.table for placed in plan.placed}
