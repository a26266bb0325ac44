"""Models by name: a configuration and a spec become a model with seeded start values."""

from importlib import import_module

import torch
from torch import nn

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.features.spec import FeatureSpec
from ninerank.towers.config import ModelConfig, parse_model
from ninerank.towers.model import RankingModel, TowerShape

__all__ = ["ModelConfig", "build_model", "build_tower", "model_names", "parse_model"]

_TOWERS = {
    "lr": "lr:LR",
    "fm": "fm:FM",
    "dnn": "dnn:DNN",
    "deepfm": "deepfm:DeepFM",
    "dcnv2": "dcnv2:DCNv2",
    "dlrm": "dlrm:DLRM",
    "din": "din:DIN",
    "xdeepfm": "xdeepfm:XDeepFM",
    "fibinet": "fibinet:FiBiNET",
    "autoint": "autoint:AutoInt",
    "masknet": "masknet:MaskNet",
    "mmoe": "mmoe:MMoE",
    "ple": "ple:PLE",
}


def model_names() -> tuple[str, ...]:
    """Names of all models.

    >>> "deepfm" in model_names()
    True
    """
    return tuple(_TOWERS)


def build_model(config: ModelConfig, spec: FeatureSpec, embedding_config: EmbeddingConfig, *, seed: int) -> RankingModel:
    """Model for a fitted spec, on the CPU; start values depend on the arguments alone, and the global random state is left as it was.

    Raises SpecError where the spec is not fitted or lacks what the model needs.
    """
    tower = build_tower(config, TowerShape.of(spec), seed=seed)
    return RankingModel(EmbeddingCollection(spec, config.groups(len(spec.labels)), embedding_config, seed=seed), tower)


def build_tower(config: ModelConfig, shape: TowerShape, *, seed: int) -> nn.Module:
    """The tower alone: a dict of tensors in, logits (B, T) out."""
    module, _, name = _TOWERS[config.name].partition(":")
    factory = getattr(import_module(f"ninerank.towers.{module}"), name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        tower: nn.Module = factory(config, shape)
    return tower
