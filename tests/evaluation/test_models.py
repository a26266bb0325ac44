"""Every model from a log to served scores: a few steps of the trainer over two labels, an export, and the engine scores as the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.evaluation.scorer import open_scorer
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.engine import Engine
from ninerank.towers.registry import model_names
from ninerank.training.recipe import Recipe
from ninerank.training.run import load_run
from ninerank.training.trainer import Trainer

SPEC: dict[str, Any] = {
    "labels": ["click", "buy"],
    "features": [
        {"kind": "id", "name": "user", "role": "user", "encoding": {"kind": "hashed", "num_buckets": 20}},
        {"kind": "sequence", "name": "recent", "role": "user", "of": "item", "max_length": 5},
        {"kind": "numeric", "name": "age", "role": "user", "transform": {"kind": "standardise"}},
        {"kind": "id", "name": "item", "role": "item", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 40}},
        {"kind": "id", "name": "tags", "role": "item", "multi": True, "max_length": 4},
    ],
}


def rows(count: int, seed: int) -> pa.RecordBatch:
    """A click depends on user and item, a purchase on the click and the item."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, 12, count), draw.integers(0, 30, count)
    click = draw.random(count) < 1 / (1 + np.exp(-2 * np.sin(user) - 2 * np.cos(item)))
    return pa.record_batch(
        {
            "click": click.astype(np.int64),
            "buy": (click & (draw.random(count) < 0.2 + 0.6 * (item % 2))).astype(np.int64),
            "user": [f"u{u}" for u in user],
            "recent": [draw.integers(0, 30, n).tolist() for n in draw.integers(0, 8, count)],
            "age": draw.normal(40.0, 10.0, count),
            "item": item,
            "tags": [[f"t{t}" for t in draw.integers(0, 6, n)] for n in draw.integers(0, 5, count)],
        }
    )


@pytest.fixture(scope="module")
def two_label_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for seed, (split, count) in enumerate({"train": 1200, "valid": 150}.items()):
        pq.write_table(pa.Table.from_batches([rows(count, seed)]), folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("name", model_names())
def test_a_model_is_trained_exported_and_served(name: str, two_label_log: Path, tmp_path: Path) -> None:
    recipe = {
        "data": {"dir": str(two_label_log), "train": "train.parquet", "valid": "valid.parquet", "batch_size": 100},
        "spec": SPEC,
        "model": {"name": name} if name == "lr" else {"name": name, "embedding_dim": 4},
        "embedding": {"init_std": 0.1},
        "optimizer": {"lr": 0.005, "sparse": {"kind": "rowwise_adagrad", "lr": 0.05}},
        "schedule": {"epochs": 1},
        "seed": 3,
        "device": "cpu",
        "log": {"tensorboard": False},
    }
    metrics = Trainer(Recipe.parse(recipe, "recipe"), tmp_path / "run").fit()
    assert metrics["steps"] == 12
    run = load_run(tmp_path / "run")
    test = rows(90, 7)
    export_bundle(run.model, run.spec, test.slice(0, 16), tmp_path / "bundle", model_name=name, version="1")
    scores_BT = Engine.load(tmp_path / "bundle", "cpu").score(test)
    assert scores_BT.shape == (90, 2)
    assert np.abs(scores_BT - open_scorer(run.directory, "cpu").score(test)).max() <= 1e-6
    assert scores_BT.std(axis=0).min() > 1e-4
