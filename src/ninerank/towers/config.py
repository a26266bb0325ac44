"""Configuration of every model, discriminated by `name`; no torch here, so that a recipe can be checked without it.

`groups(num_tasks)` says which embedding groups (name -> dim) a model reads: "deep" holds the vectors, "linear" one weight
per id and task.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from ninerank.config import Config
from ninerank.errors import SpecError, nearest

__all__ = [
    "Activation",
    "DCNv2Config",
    "DINConfig",
    "DLRMConfig",
    "DNNConfig",
    "DeepFMConfig",
    "FMConfig",
    "LRConfig",
    "MLPConfig",
    "ModelConfig",
    "parse_model",
]

Activation = Literal["relu", "gelu", "prelu", "dice"]
Widths = tuple[PositiveInt, ...]


class MLPConfig(Config):
    """Hidden layers, each Linear, BatchNorm (if asked for), activation, dropout, in this order."""

    hidden: Widths = (400, 400, 400)
    activation: Activation = "relu"
    batch_norm: bool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class _DeepConfig(Config):
    embedding_dim: PositiveInt = 16

    def groups(self, num_tasks: int) -> dict[str, int]:
        return {"deep": self.embedding_dim}


class _WideDeepConfig(_DeepConfig):
    def groups(self, num_tasks: int) -> dict[str, int]:
        return {"deep": self.embedding_dim, "linear": num_tasks}


class LRConfig(Config):
    """Logistic regression."""

    name: Literal["lr"] = "lr"

    def groups(self, num_tasks: int) -> dict[str, int]:
        return {"linear": num_tasks}


class FMConfig(_WideDeepConfig):
    """Factorisation machine."""

    name: Literal["fm"] = "fm"


class DNNConfig(_DeepConfig):
    """MLP over the concatenated embeddings."""

    name: Literal["dnn"] = "dnn"
    mlp: MLPConfig = MLPConfig()


class DeepFMConfig(_WideDeepConfig):
    """FM and MLP over the same embeddings."""

    name: Literal["deepfm"] = "deepfm"
    mlp: MLPConfig = MLPConfig()


class DCNv2Config(_DeepConfig):
    """Cross network and MLP, side by side (`parallel`) or one on the other (`stacked`); `low_rank` None means full rank."""

    name: Literal["dcnv2"] = "dcnv2"
    structure: Literal["parallel", "stacked"] = "parallel"
    cross_layers: PositiveInt = 3
    low_rank: PositiveInt | None = None
    mlp: MLPConfig = MLPConfig()


class DLRMConfig(_DeepConfig):
    """Bottom MLP over the numbers (its last layer, of width `embedding_dim`, is added), dot interaction, top MLP."""

    name: Literal["dlrm"] = "dlrm"
    bottom: MLPConfig = MLPConfig(hidden=(64,))
    top: MLPConfig = MLPConfig()


class DINConfig(_DeepConfig):
    """Target attention over every sequence; `attention: mean` is its ablation, which pools the history without looking at the target."""

    name: Literal["din"] = "din"
    attention: Literal["target", "mean"] = "target"
    attention_hidden: Widths = (80, 40)
    attention_activation: Activation = "dice"
    softmax: bool = False
    mlp: MLPConfig = MLPConfig(hidden=(200, 80), activation="dice")


_CONFIGS: dict[str, type[Config]] = {
    "lr": LRConfig,
    "fm": FMConfig,
    "dnn": DNNConfig,
    "deepfm": DeepFMConfig,
    "dcnv2": DCNv2Config,
    "dlrm": DLRMConfig,
    "din": DINConfig,
}


def _known_name(data: object) -> object:
    if isinstance(data, dict) and "name" in data and not _is_known(data["name"]):
        raise ValueError(f"unknown model {data['name']!r}; {nearest(str(data['name']), _CONFIGS)}")
    return data


def _is_known(name: object) -> bool:
    return isinstance(name, str) and name in _CONFIGS


ModelConfig = Annotated[
    Annotated[
        LRConfig | FMConfig | DNNConfig | DeepFMConfig | DCNv2Config | DLRMConfig | DINConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(_known_name),
]


def parse_model(data: object, what: str = "model") -> ModelConfig:
    """Configuration of one model from a mapping with `name`; raises SpecError for an unknown name or key.

    >>> parse_model({"name": "fm", "embedding_dim": 4})
    FMConfig(embedding_dim=4, name='fm')
    >>> parse_model({"name": "deepfn"})
    Traceback (most recent call last):
    ...
    ninerank.errors.SpecError: model: unknown model 'deepfn'; did you mean 'deepfm'? valid: dcnv2, deepfm, din, dlrm, dnn, fm, lr
    """
    if not isinstance(data, dict) or "name" not in data:
        raise SpecError(f"{what}: a mapping with key 'name' is needed, got {data!r:.80}; {nearest('', _CONFIGS)}")
    name = data["name"]
    if not _is_known(name):
        raise SpecError(f"{what}: unknown model {name!r}; {nearest(str(name), _CONFIGS)}")
    return _CONFIGS[name].parse(data, what)  # type: ignore[return-value]
