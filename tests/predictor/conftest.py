"""A small model with every kind of feature, its bundle, and requests for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.bundle import export_bundle
from ninerank.towers.model import RankingModel

SPEC = {
    "labels": ["click"],
    "features": [
        {"name": "user_id", "kind": "id", "role": "user", "encoding": {"kind": "hashed", "num_buckets": 50}},
        {"name": "age", "kind": "numeric", "role": "user", "transform": {"kind": "log"}},
        {"name": "hour", "kind": "id", "role": "context", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 24}},
        {"name": "history", "kind": "sequence", "role": "user", "of": "item_id", "max_length": 8},
        {"name": "item_id", "kind": "id", "role": "item", "encoding": {"kind": "vocabulary", "values": [f"i{n}" for n in range(40)]}},
        {"name": "tags", "kind": "id", "role": "item", "multi": True, "encoding": {"kind": "hashed", "num_buckets": 20}},
        {"name": "price", "kind": "numeric", "role": "item"},
        {
            "name": "bucket",
            "kind": "numeric",
            "role": "item",
            "column": "price",
            "transform": {"kind": "bucketize", "boundaries": [1.0, 2.0]},
        },
        {"name": "city", "kind": "id", "role": "item", "default": "paris", "encoding": {"kind": "hashed", "num_buckets": 10}},
    ],
}


class SmallTower(torch.nn.Module):
    """A tower that reads everything a batch offers, with BatchNorm, an in-place activation and attention over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(6 * 4 + 2 + 4, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(inplace=True),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 1),
        )

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        deep_BFD, sequence_BLD = inputs["deep"], inputs["deep.seq.history"]
        weight_BL = (sequence_BLD * deep_BFD[:, 2:3]).sum(2).masked_fill(~inputs["mask.history"], -1e9).softmax(1)
        history_BD = (weight_BL[:, :, None] * sequence_BLD).sum(1)
        return self.mlp(torch.cat([deep_BFD.flatten(1), inputs["dense"], history_BD], 1)) + inputs["linear"].sum(1)


@pytest.fixture(scope="session")
def spec() -> FeatureSpec:
    return FeatureSpec.parse(SPEC, "spec")


@pytest.fixture(scope="session")
def model(spec: FeatureSpec) -> RankingModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tower = SmallTower()
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        collection = EmbeddingCollection(spec, {"deep": 4, "linear": 1}, EmbeddingConfig(init_std=1.0), seed=1)
    return RankingModel(collection, tower).eval()


def draw_rows(count: int, seed: int = 0) -> pa.RecordBatch:
    """Rows as a training log has them, label included, with missing values of every kind."""
    rng = np.random.default_rng(seed)

    def maybe(values: list[Any]) -> list[Any]:
        return [None if rng.random() < 0.1 else value for value in values]

    return pa.record_batch(
        {
            "click": pa.array(rng.integers(0, 2, count)),
            "user_id": pa.array(maybe([f"u{n}" for n in rng.integers(0, 90, count)])),
            "age": pa.array(maybe(rng.uniform(0, 80, count).tolist())),
            "hour": pa.array(maybe(rng.integers(0, 24, count).tolist()), pa.int64()),
            "history": pa.array(
                maybe([[f"i{n}" for n in rng.integers(0, 60, rng.integers(0, 12))] for _ in range(count)]), pa.list_(pa.string())
            ),
            "item_id": pa.array(maybe([f"i{n}" for n in rng.integers(0, 60, count)])),
            "tags": pa.array(
                maybe([[f"t{n}" for n in rng.integers(0, 30, rng.integers(0, 5))] for _ in range(count)]), pa.list_(pa.string())
            ),
            "price": pa.array(maybe(rng.uniform(0, 5, count).tolist())),
            "city": pa.array(maybe([f"çity {n}" for n in rng.integers(0, 30, count)])),
        }
    )


@pytest.fixture(scope="session")
def log_rows() -> Callable[..., pa.RecordBatch]:
    return draw_rows


@pytest.fixture(scope="session")
def bundle_dir(model: RankingModel, spec: FeatureSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests read and never change."""
    out = tmp_path_factory.mktemp("bundle") / "small"
    export_bundle(model, spec, draw_rows(64), out, model_name="small", version="7")
    return out
