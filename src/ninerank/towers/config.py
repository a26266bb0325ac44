"""Configuration of every model, discriminated by `name`; no torch here, so that a recipe can be checked without it.

`groups(num_tasks)` says which embedding groups (name -> dim) a model reads: "deep" holds the vectors, "linear" one weight
per id and task.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from ninerank.config import Config
from ninerank.errors import SpecError, nearest

__all__ = [
    "Activation",
    "AutoIntConfig",
    "BilinearKind",
    "DCNv2Config",
    "DINConfig",
    "DLRMConfig",
    "DNNConfig",
    "DeepFMConfig",
    "FMConfig",
    "FiBiNETConfig",
    "LRConfig",
    "MLPConfig",
    "MMoEConfig",
    "MaskNetConfig",
    "ModelConfig",
    "PLEConfig",
    "XDeepFMConfig",
    "parse_model",
]

Activation = Literal["relu", "gelu", "prelu", "dice"]
BilinearKind = Literal["all", "each", "interaction"]
Widths = tuple[PositiveInt, ...]
SomeWidths = Annotated[Widths, Field(min_length=1)]


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
    """Cross network and MLP, side by side (`parallel`) or one on the other (`stacked`).

    `low_rank` None means full rank; with a rank, `experts` mixes so many cross layers of that rank in each.
    """

    name: Literal["dcnv2"] = "dcnv2"
    structure: Literal["parallel", "stacked"] = "parallel"
    cross_layers: PositiveInt = 3
    low_rank: PositiveInt | None = None
    experts: PositiveInt | None = None
    mlp: MLPConfig = MLPConfig()

    @model_validator(mode="after")
    def _experts_have_a_rank(self) -> Self:
        if self.experts is not None and self.low_rank is None:
            raise ValueError(f"experts: {self.experts} needs low_rank, the rank of each expert")
        return self


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


class XDeepFMConfig(_WideDeepConfig):
    """Linear term, compressed interaction network (`cin`: vectors of each layer) and MLP."""

    name: Literal["xdeepfm"] = "xdeepfm"
    cin: SomeWidths = (128, 128)
    mlp: MLPConfig = MLPConfig()


class FiBiNETConfig(_WideDeepConfig):
    """Linear term, and MLP over the bilinear pairs of the fields and of the fields as a gate weighs them."""

    name: Literal["fibinet"] = "fibinet"
    bilinear: BilinearKind = "interaction"
    reduction: PositiveInt = 3
    mlp: MLPConfig = MLPConfig()


class AutoIntConfig(_DeepConfig):
    """Layers of self-attention over the fields; with `mlp`, an MLP over the fields beside them."""

    name: Literal["autoint"] = "autoint"
    layers: PositiveInt = 3
    heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    mlp: MLPConfig | None = None


class MaskNetConfig(_DeepConfig):
    """Mask blocks (`blocks`: their widths) in series or in parallel, and an MLP on them; `hidden: []` makes it one Linear."""

    name: Literal["masknet"] = "masknet"
    structure: Literal["serial", "parallel"] = "parallel"
    blocks: SomeWidths = (128, 128, 128)
    reduction_ratio: PositiveFloat = 2.0
    mlp: MLPConfig = MLPConfig(hidden=(128,))


class MMoEConfig(_DeepConfig):
    """Experts that all tasks share, a gate and an MLP (`tower`) per task."""

    name: Literal["mmoe"] = "mmoe"
    experts: PositiveInt = 8
    expert: MLPConfig = MLPConfig(hidden=(256, 128))
    tower: MLPConfig = MLPConfig(hidden=(64,))


class PLEConfig(_DeepConfig):
    """Levels of experts, of each task its own and shared ones, with a gate per task and level, and an MLP (`tower`) per task."""

    name: Literal["ple"] = "ple"
    levels: PositiveInt = 2
    task_experts: PositiveInt = 2
    shared_experts: PositiveInt = 2
    expert: MLPConfig = MLPConfig(hidden=(256, 128))
    tower: MLPConfig = MLPConfig(hidden=(64,))


_CONFIGS: dict[str, type[Config]] = {
    "lr": LRConfig,
    "fm": FMConfig,
    "dnn": DNNConfig,
    "deepfm": DeepFMConfig,
    "dcnv2": DCNv2Config,
    "dlrm": DLRMConfig,
    "din": DINConfig,
    "xdeepfm": XDeepFMConfig,
    "fibinet": FiBiNETConfig,
    "autoint": AutoIntConfig,
    "masknet": MaskNetConfig,
    "mmoe": MMoEConfig,
    "ple": PLEConfig,
}


def _known_name(data: object) -> object:
    if isinstance(data, dict) and "name" in data and not _is_known(data["name"]):
        raise ValueError(f"unknown model {data['name']!r}; {nearest(str(data['name']), _CONFIGS)}")
    return data


def _is_known(name: object) -> bool:
    return isinstance(name, str) and name in _CONFIGS


ModelConfig = Annotated[
    Annotated[
        LRConfig
        | FMConfig
        | DNNConfig
        | DeepFMConfig
        | DCNv2Config
        | DLRMConfig
        | DINConfig
        | XDeepFMConfig
        | FiBiNETConfig
        | AutoIntConfig
        | MaskNetConfig
        | MMoEConfig
        | PLEConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(_known_name),
]


def parse_model(data: object, what: str = "model") -> ModelConfig:
    """Configuration of one model from a mapping with `name`; raises SpecError for an unknown name or key.

    >>> parse_model({"name": "fm", "embedding_dim": 4})
    FMConfig(embedding_dim=4, name='fm')
    >>> parse_model({"name": "deepfn"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ninerank.errors.SpecError: model: unknown model 'deepfn'; did you mean 'deepfm'? valid: autoint, dcnv2, deepfm, din, ...
    """
    if not isinstance(data, dict) or "name" not in data:
        raise SpecError(f"{what}: a mapping with key 'name' is needed, got {data!r:.80}; {nearest('', _CONFIGS)}")
    name = data["name"]
    if not _is_known(name):
        raise SpecError(f"{what}: unknown model {name!r}; {nearest(str(name), _CONFIGS)}")
    return _CONFIGS[name].parse(data, what)  # type: ignore[return-value]
