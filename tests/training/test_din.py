"""Attention over the history earns its keep: DIN against the plain mean of the same history, on a log whose truth counts matches."""

import pytest

from ninerank.features.sources.synthetic import SyntheticConfig, generate
from ninerank.features.sources.world import Effects
from ninerank.features.spec import FeatureSpec
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Trainer

SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A smaller log than the default, in which the history matters more."""
    folder = tmp_path_factory.mktemp("synthetic")
    truth = generate(SyntheticConfig(num_rows=200_000, num_users=2_000, num_items=400, effects=Effects(history=0.6)), folder)
    return folder, truth.splits["test"].bayes_auc


def auc(log, out, attention: str, seed: int) -> float:
    recipe = Recipe.parse(
        {
            "data": {"dir": str(log[0]), "train": "train.parquet", "valid": "valid.parquet", "test": "test.parquet", "batch_size": 512},
            "spec": FeatureSpec.load(log[0] / "spec.yaml").model_dump(),
            "model": {
                "name": "din",
                "embedding_dim": 8,
                "attention": attention,
                "attention_hidden": [32],
                "attention_activation": "prelu",
                "mlp": {"hidden": [64, 32], "activation": "prelu"},
            },
            "embedding": {"init_std": 0.05},
            "optimizer": {"lr": 2e-3},
            "schedule": {"epochs": 3, "lr": {"kind": "cosine"}},
            "device": "cpu",
            "seed": seed,
            "log": {"tensorboard": False},
        },
        "recipe",
    )
    return Trainer(recipe, out / f"{attention}-{seed}").fit()["test"]["auc"]


@pytest.mark.slow
def test_din_beats_its_pooled_history_for_each_seed(log, tmp_path):
    for seed in SEEDS:
        target, mean = (auc(log, tmp_path, attention, seed) for attention in ("target", "mean"))
        print(f"seed {seed}: DIN {target:.4f}, mean {mean:.4f}, Bayes {log[1]:.4f}")
        assert mean + 0.005 < target < log[1]
