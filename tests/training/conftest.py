"""A small log with every kind of feature, and recipes over it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ninerank.training.recipe import Recipe

ROWS = {"train": 700, "valid": 300, "test": 250}
SPEC: dict[str, Any] = {
    "labels": ["click"],
    "weight": "weight",
    "group": "user",
    "features": [
        {"kind": "id", "name": "user", "role": "user"},
        {"kind": "id", "name": "item", "role": "item", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 40}},
        {"kind": "id", "name": "tags", "role": "item", "multi": True, "max_length": 4},
        {"kind": "sequence", "name": "recent", "role": "user", "of": "item", "max_length": 5},
        {"kind": "numeric", "name": "age", "role": "user", "transform": {"kind": "standardise"}},
        {"kind": "numeric", "name": "price", "role": "item", "transform": {"kind": "bucketize", "num_buckets": 4}},
    ],
}
MakeRecipe = Callable[..., Recipe]


def write_log(path: Path, num_rows: int, seed: int) -> None:
    """Rows whose click depends on user, item and price, so that there is something to learn."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, 12, num_rows), draw.integers(0, 30, num_rows)
    price = draw.gamma(2.0, 3.0, num_rows)
    logit = 1.5 * np.sin(user) + 1.5 * np.cos(item) - 0.1 * price
    columns = {
        "click": (draw.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.int64),
        "weight": draw.uniform(0.5, 2.0, num_rows),
        "user": [f"u{u}" for u in user],
        "item": item,
        "tags": [[f"t{t}" for t in draw.integers(0, 6, n)] for n in draw.integers(0, 5, num_rows)],
        "recent": [draw.integers(0, 30, n).tolist() for n in draw.integers(0, 8, num_rows)],
        "age": draw.normal(40.0, 10.0, num_rows),
        "price": price,
    }
    parquet.write_table(pa.table(columns), path, row_group_size=150)


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    for seed, (split, rows) in enumerate(ROWS.items()):
        write_log(folder / f"{split}.parquet", rows, seed)
    (folder / "spec.json").write_text(json.dumps(SPEC))
    return folder


@pytest.fixture
def mapping(log_dir: Path) -> dict[str, Any]:
    """A small recipe as a mapping: batch normalisation and dropout are on, eight batches an epoch, the last one short."""
    return {
        "data": {"dir": str(log_dir), "train": "train.parquet", "valid": "valid.parquet", "test": "test.parquet", "batch_size": 96},
        "spec": json.loads(json.dumps(SPEC)),
        "model": {"name": "deepfm", "embedding_dim": 4, "mlp": {"hidden": [16, 8], "batch_norm": True, "dropout": 0.3}},
        "optimizer": {"lr": 0.01},
        "schedule": {"epochs": 3},
        "device": "cpu",
        "log": {"every_steps": 3, "tensorboard": False},
    }


@pytest.fixture
def make_recipe(mapping: dict[str, Any]) -> MakeRecipe:
    """A recipe with `a.b=c` applied."""
    return lambda *overrides: Recipe.parse(mapping, "recipe").override(overrides)
