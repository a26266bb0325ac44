"""Every model of the registry, in the forms that differ in their operators, a spec with every kind of feature, and batches for it."""

from collections.abc import Iterator
from typing import Any

import torch

from ninerank.features.batch import Batch
from ninerank.features.draw import draw_batch
from ninerank.features.spec import Bucketize, FeatureSpec, Hashed, IdFeature, NumericFeature, SequenceFeature
from ninerank.towers.config import ModelConfig, parse_model
from ninerank.towers.registry import model_names

__all__ = ["SPEC", "batch", "models"]

MLP = {"hidden": [24, 16]}
# Beside each model as it is by default: what else can be chosen in it.
FORMS: dict[str, dict[str, Any]] = {
    "dnn, norm, dropout, gelu": {"name": "dnn", "mlp": {**MLP, "batch_norm": True, "dropout": 0.1, "activation": "gelu"}},
    "dnn, prelu": {"name": "dnn", "mlp": {**MLP, "activation": "prelu"}},
    "dcnv2, low rank": {"name": "dcnv2", "low_rank": 4, "mlp": MLP},
    "dcnv2, stacked": {"name": "dcnv2", "structure": "stacked", "mlp": MLP},
    "dcnv2, experts": {"name": "dcnv2", "low_rank": 4, "experts": 3, "mlp": MLP},
    "fibinet, all": {"name": "fibinet", "bilinear": "all", "mlp": MLP},
    "autoint, deep": {"name": "autoint", "layers": 1, "mlp": MLP},
    "masknet, serial": {"name": "masknet", "structure": "serial", "blocks": [32, 16]},
    "din, softmax": {"name": "din", "softmax": True, "attention_activation": "prelu"},
    "din, mean": {"name": "din", "attention": "mean"},
}
_ITEMS = Hashed(num_buckets=300)
SPEC = FeatureSpec(
    labels=("click", "buy"),
    features=(
        IdFeature(name="user", role="user", encoding=Hashed(num_buckets=200)),
        IdFeature(name="item", role="item", encoding=_ITEMS),
        IdFeature(name="last_item", role="user", encoding=_ITEMS, table="item"),
        IdFeature(name="hour", role="context", encoding=Hashed(num_buckets=24)),
        IdFeature(name="interests", role="user", encoding=Hashed(num_buckets=30), multi=True, pooling="mean", max_length=5),
        IdFeature(name="tags", role="item", encoding=Hashed(num_buckets=40), multi=True, pooling="sum", max_length=4),
        SequenceFeature(name="recent", role="user", of="item", max_length=6),
        SequenceFeature(name="similar", role="item", of="item", max_length=3),
        NumericFeature(name="age", role="user", transform=Bucketize(num_buckets=3, boundaries=(20.0, 40.0))),
        NumericFeature(name="income", role="user"),
        NumericFeature(name="price", role="item"),
    ),
)


def models() -> Iterator[tuple[str, ModelConfig]]:
    """Name and configuration of all of them."""
    for name in model_names():
        yield name, parse_model({"name": name})
    for form, mapping in FORMS.items():
        yield form, parse_model(mapping)


def batch(num_rows: int, *, num_requests: int | None = None, seed: int = 0) -> Batch:
    """Random rows on the host: a training batch, or with `num_requests` a rank call."""
    return draw_batch(SPEC, num_rows, torch.Generator().manual_seed(seed), num_requests=num_requests, longest=3)
