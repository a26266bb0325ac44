"""Shapes with and without numbers, sequences and several tasks, and random inputs for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ninerank.towers.config import ModelConfig, parse_model
from ninerank.towers.model import SequenceShape, TowerShape

SMALL = {"embedding_dim": 4}
MLP = {"hidden": [6, 5]}
CONFIGS: dict[str, dict[str, object]] = {
    "lr": {"name": "lr"},
    "fm": {"name": "fm", **SMALL},
    "dnn": {"name": "dnn", **SMALL, "mlp": {**MLP, "batch_norm": True, "dropout": 0.1}},
    "deepfm": {"name": "deepfm", **SMALL, "mlp": {**MLP, "batch_norm": True}},
    "dcnv2": {"name": "dcnv2", **SMALL, "cross_layers": 2, "mlp": MLP},
    "dcnv2-low-rank": {"name": "dcnv2", **SMALL, "cross_layers": 3, "low_rank": 2, "mlp": MLP},
    "dcnv2-experts": {"name": "dcnv2", **SMALL, "cross_layers": 2, "low_rank": 3, "experts": 2, "mlp": MLP},
    "dcnv2-stacked": {"name": "dcnv2", **SMALL, "structure": "stacked", "mlp": {**MLP, "activation": "gelu"}},
    "dlrm": {"name": "dlrm", **SMALL, "bottom": {"hidden": [7]}, "top": MLP},
    "din": {"name": "din", **SMALL, "attention_hidden": [6, 3], "mlp": {**MLP, "activation": "dice"}},
    "din-prelu": {"name": "din", **SMALL, "attention_hidden": [6], "attention_activation": "prelu", "softmax": True, "mlp": MLP},
    "din-mean": {"name": "din", **SMALL, "attention": "mean", "mlp": MLP},
    "xdeepfm": {"name": "xdeepfm", **SMALL, "cin": [3, 5, 2], "mlp": MLP},
    "fibinet-all": {"name": "fibinet", **SMALL, "bilinear": "all", "reduction": 1, "mlp": MLP},
    "fibinet-each": {"name": "fibinet", **SMALL, "bilinear": "each", "reduction": 2, "mlp": {**MLP, "batch_norm": True}},
    "fibinet": {"name": "fibinet", **SMALL, "mlp": {"hidden": []}},
    "autoint": {"name": "autoint", **SMALL, "layers": 2, "heads": 2, "head_dim": 3},
    "autoint-plus": {"name": "autoint", **SMALL, "layers": 1, "heads": 1, "head_dim": 5, "mlp": MLP},
    "masknet": {"name": "masknet", **SMALL, "blocks": [6, 5], "reduction_ratio": 0.5, "mlp": {"hidden": [8]}},
    "masknet-serial": {"name": "masknet", **SMALL, "structure": "serial", "blocks": [6, 7, 5], "mlp": {"hidden": []}},
    "mmoe": {"name": "mmoe", **SMALL, "experts": 3, "expert": {**MLP, "batch_norm": True}, "tower": {"hidden": [4]}},
    "ple": {"name": "ple", **SMALL, "task_experts": 2, "shared_experts": 1, "expert": MLP, "tower": {"hidden": [4], "activation": "gelu"}},
    "ple-cgc": {"name": "ple", **SMALL, "levels": 1, "task_experts": 1, "shared_experts": 2, "expert": {"hidden": [6]}},
}
SHAPES = {
    "ids": TowerShape(num_fields=3, num_dense=0, sequences=(), num_tasks=1),
    "numbers": TowerShape(num_fields=3, num_dense=2, sequences=(), num_tasks=1),
    "all": TowerShape(num_fields=4, num_dense=3, sequences=(SequenceShape("recent", 3), SequenceShape("tags", 1)), num_tasks=1),
    "tasks": TowerShape(num_fields=3, num_dense=1, sequences=(SequenceShape("recent", 0),), num_tasks=3),
}
CASES = [
    pytest.param(model, shape, id=f"{model}-{shape}")
    for model in CONFIGS
    for shape in SHAPES
    if not (model.startswith("din") and shape in ("ids", "numbers"))
]
MakeInputs = Callable[..., dict[str, Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"config_name", "shape_name"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("config_name", "shape_name"), CASES)


@pytest.fixture
def config(config_name: str) -> ModelConfig:
    return parse_model(CONFIGS[config_name])


@pytest.fixture
def shape(shape_name: str) -> TowerShape:
    return SHAPES[shape_name]


@pytest.fixture
def make_inputs() -> MakeInputs:
    """A collection's output for a config's groups, drawn at random; sequences have rows of every length, none and full among them."""

    def make(
        config: ModelConfig, shape: TowerShape, rows: int, *, length: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        inputs = {"dense": torch.randn(rows, shape.num_dense, generator=draw, dtype=dtype)}
        masks = {s.name: torch.arange(length) < (torch.randint(0, length + 1, (rows, 1), generator=draw)) for s in shape.sequences}
        for mask in masks.values():
            mask[0] = False
            mask[-1] = True
        for group, dim in config.groups(shape.num_tasks).items():
            inputs[group] = torch.randn(rows, shape.num_fields, dim, generator=draw, dtype=dtype)
            for name, mask in masks.items():
                inputs[f"{group}.seq.{name}"] = torch.randn(rows, length, dim, generator=draw, dtype=dtype) * mask.unsqueeze(2)
        inputs.update({f"mask.{name}": mask for name, mask in masks.items()})
        return inputs

    return make
