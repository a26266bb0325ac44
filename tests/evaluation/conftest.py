"""A small log with a signal in it, a run trained on it, and the run's bundle."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.predictor.bundle import export_bundle
from ninerank.training.recipe import Recipe
from ninerank.training.run import Run, load_run
from ninerank.training.trainer import Trainer

SPEC = {
    "labels": ["click"],
    "group": "user",
    "features": [
        {"name": "user", "kind": "id", "role": "user", "encoding": {"kind": "hashed", "num_buckets": 100}},
        {"name": "hour", "kind": "id", "role": "context", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 24}},
        {"name": "item", "kind": "id", "role": "item", "encoding": {"kind": "vocabulary"}},
        {"name": "price", "kind": "numeric", "role": "item", "transform": {"kind": "log"}},
    ],
}


def draw_log(rows: int, seed: int) -> pa.Table:
    """Clicks that depend on item and price; `device` is for slicing only."""
    rng = np.random.default_rng(seed)
    item, price = rng.integers(0, 30, rows), rng.lognormal(1, 1, rows)
    chance = 1 / (1 + np.exp(-((item % 7) * 0.8 - 3 - 0.4 * np.log1p(price))))
    return pa.table(
        {
            "click": pa.array((rng.random(rows) < chance).astype(np.int64)),
            "user": pa.array([f"u{n}" for n in rng.integers(0, 60, rows)]),
            "hour": pa.array(rng.integers(0, 24, rows)),
            "item": pa.array([f"i{n}" for n in item]),
            "price": pa.array(price),
            "device": pa.array([None if n == 3 else ("phone", "desk", "tv")[n] for n in rng.integers(0, 4, rows)]),
        }
    )


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, valid and test.parquet, and test.csv with the same rows as test.parquet."""
    out = tmp_path_factory.mktemp("log")
    for seed, (split, rows) in enumerate({"train": 4000, "valid": 800, "test": 1500}.items()):
        pq.write_table(draw_log(rows, seed), out / f"{split}.parquet")
    return out


@pytest.fixture(scope="session")
def run(log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run that tests read and never change."""
    recipe = {
        "data": {"dir": str(log_dir), "train": "train.parquet", "valid": "valid.parquet", "test": "test.parquet", "batch_size": 200},
        "spec": SPEC,
        "model": {"name": "deepfm", "embedding_dim": 4, "mlp": {"hidden": [16]}},
        "schedule": {"epochs": 2},
        "optimizer": {"lr": 0.01},
        "device": "cpu",
    }
    out = tmp_path_factory.mktemp("runs") / "small"
    Trainer(Recipe.parse(recipe, "recipe"), out).fit()
    return load_run(out)


@pytest.fixture(scope="session")
def bundle_dir(run: Run, log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's bundle."""
    out = tmp_path_factory.mktemp("bundles") / "small"
    golden = pq.read_table(log_dir / "test.parquet").slice(0, 32).combine_chunks().to_batches()[0]
    export_bundle(run.model, run.spec, golden, out, model_name="small", version="3")
    return out
