"""Ids outside a table that numbers its rows: one rule through training, bundle and engine."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError
from ninerank.evaluation.scorer import open_scorer
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.engine import Engine
from ninerank.training.recipe import Recipe
from ninerank.training.run import load_run
from ninerank.training.trainer import Trainer

NUM_IDS = 20


def recipe_of(log_dir: Path, out_of_range: str) -> Recipe:
    encoding = {"kind": "numbered", "num_ids": NUM_IDS, "out_of_range": out_of_range}
    recipe: dict[str, Any] = {
        "data": {"dir": str(log_dir), "train": "train.parquet", "valid": "valid.parquet", "batch_size": 500},
        "spec": {
            "labels": ["click"],
            "features": [
                {"name": "hour", "kind": "id", "role": "context", "dtype": "int64", "encoding": encoding},
                {"name": "item", "kind": "id", "role": "item"},
            ],
        },
        "model": {"name": "fm", "embedding_dim": 4},
        "schedule": {"epochs": 1},
        "device": "cpu",
    }
    return Recipe.parse(recipe, "recipe")


@pytest.mark.parametrize(("out_of_range", "stands_for"), [("clamp", NUM_IDS - 1), ("default", None)])
def test_trained_exported_and_served_alike(log_dir: Path, tmp_path: Path, out_of_range: str, stands_for: int | None) -> None:
    Trainer(recipe_of(log_dir, out_of_range), tmp_path / "run").fit()
    run = load_run(tmp_path / "run")
    rows = pq.read_table(log_dir / "test.parquet", columns=["hour", "item"]).slice(0, 200).combine_chunks().to_batches()[0]
    export_bundle(run.model, run.spec, rows, tmp_path / "bundle", model_name="numbered", version="1")
    engine = Engine.load(tmp_path / "bundle", "cpu")
    hours = rows.column("hour").to_pylist()
    assert max(hours) >= NUM_IDS
    said = [hour if hour < NUM_IDS else stands_for for hour in hours]
    within = pa.record_batch({"hour": pa.array(said, pa.int64()), "item": rows.column("item")})
    assert (engine.score(rows) == engine.score(within)).all()
    assert abs(engine.score(rows) - open_scorer(tmp_path / "run", "cpu").score(rows)).max() <= 1e-6


def test_training_refuses_what_the_table_refuses(log_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'hour', row \d+: id 2[0-3] is outside table 'hour' of 20 ids"):
        Trainer(recipe_of(log_dir, "error"), tmp_path / "run").fit()
