"""A training run as one frozen value: data, spec, model, embedding, optimizer, schedule, loss, device.

    recipe = Recipe.load("examples/frappe_deepfm.yaml", ["schedule.epochs=3"])

It comes from a YAML or JSON file, from a Python file that defines `recipe()`, or from Python.
"""

import os
import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from ninerank.config import Config, read_mapping, yaml_problem
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.embedding.sharding.config import ShardingConfig
from ninerank.errors import SpecError
from ninerank.features.spec import FeatureSpec
from ninerank.towers.config import ModelConfig
from ninerank.training.loss import LossConfig
from ninerank.training.optimizer import OptimizerConfig
from ninerank.training.schedule import ScheduleConfig

__all__ = ["CheckpointConfig", "DataConfig", "LogConfig", "Recipe", "apply_override", "expand"]

Paths = str | tuple[str, ...]


class DataConfig(Config):
    """Log files and how they are read.

    dir: base of the three splits; `$NAME` and `${NAME}` stand for environment variables. train, valid, test: one file or several.
    batch_size: rows of a batch, in evaluation too. shuffle: a new order of the training rows each epoch, a pure function of (seed, epoch).
    drop_last: leave out a last training batch that is not full. prefetch: batches made ahead on a background thread, 0 for none.
    cache_bytes: a split whose transformed rows fit is kept in memory, so that later epochs do not parse it again.
    fit_rows: training rows from which an unfitted spec is fitted; all of them by default.
    """

    dir: str = "."
    train: Paths
    valid: Paths
    test: Paths | None = None
    format: Literal["auto", "csv", "tsv", "parquet", "arrow", "criteo", "libsvm"] = "auto"
    batch_size: PositiveInt = 4096
    shuffle: bool = True
    drop_last: bool = False
    prefetch: NonNegativeInt = 4
    cache_bytes: NonNegativeInt = 1 << 30
    fit_rows: PositiveInt | None = None

    @field_validator("dir")
    @classmethod
    def _expanded(cls, value: str) -> str:
        return expand(value)

    def files(self, split: Literal["train", "valid", "test"]) -> tuple[Path, ...]:
        """Paths of a split; raises SpecError for one that does not exist."""
        names: Paths = getattr(self, split) or ()
        paths = tuple(Path(self.dir, expand(name)) for name in ((names,) if isinstance(names, str) else names))
        if not Path(self.dir).is_dir():
            raise SpecError(f"data.dir: {self.dir!r} is no directory; give the folder of {names!r} with --set data.dir=...")
        for path in paths:
            if not path.exists():
                raise SpecError(f"data.{split}: {path} does not exist")
        return paths


class CheckpointConfig(Config):
    """A checkpoint at the end of each epoch, and every `every_steps` steps if given; the newest `keep_last` are kept.

    asynchronous: training goes on as soon as the state has been copied to host memory, which takes as much of it as the state is large;
    false writes without a copy while training waits.
    """

    every_steps: PositiveInt | None = None
    keep_last: PositiveInt = 2
    asynchronous: bool = True


class LogConfig(Config):
    """A line of history every `every_steps` steps; TensorBoard too, `auto` where it is installed."""

    every_steps: PositiveInt = 50
    tensorboard: bool | Literal["auto"] = "auto"


class Recipe(Config):
    """Everything that decides what a training run computes, and where.

    spec: inline, or in a file the path of a spec: relative to the recipe, else to `data.dir`. sharding: where tables lie when several
    processes train. precision: `bf16` runs the forward in autocast. seed: start values, order of rows and dropout.
    """

    data: DataConfig
    spec: FeatureSpec
    model: ModelConfig
    embedding: EmbeddingConfig = EmbeddingConfig()
    sharding: ShardingConfig = ShardingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(default=2021, ge=0, lt=1 << 63)
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _ftrl_needs_a_constant_rate(self) -> Self:
        lr = self.schedule.lr.kind
        if self.embedding.mode == "sparse" and self.optimizer.sparse.kind == "ftrl" and lr != "constant":
            raise ValueError(f"optimizer.sparse.kind 'ftrl' needs a constant schedule.lr, not {lr!r}: its state depends on the rate")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML or JSON file, or call `recipe()` of a Python file, then apply overrides `a.b=c`.

        Raises SpecError for a key that does not exist (with the nearest that does), a value that does not fit, a file that cannot be
        read, an environment variable that is not set.
        """
        file = Path(path)
        mapping = _from_python(file) if file.suffix == ".py" else read_mapping(file)
        pairs = [(text, text.partition("=")[0]) for text in overrides]
        for text, key in pairs:
            if not key.startswith("spec."):
                apply_override(mapping, text)
        if isinstance(mapping.get("spec"), str):
            mapping["spec"] = _read_spec(mapping["spec"], file.parent, mapping)
        for text, key in pairs:
            if key.startswith("spec."):
                apply_override(mapping, text)
        return cls.parse(mapping, str(file))

    def override(self, overrides: Iterable[str]) -> Self:
        """New recipe with `a.b=c` applied."""
        mapping = self.model_dump(mode="json")
        for text in overrides:
            apply_override(mapping, text)
        return self.parse(mapping, "recipe")

    def resolved(self, device: str) -> Self:
        """The same run with nothing left to the surroundings: absolute paths, the device's own name."""
        data = self.data.model_copy(update={"dir": str(Path(self.data.dir).absolute())})
        tiers = {
            name: tier.model_copy(update={"directory": tier.directory and str(Path(expand(tier.directory)).absolute())})
            for name, tier in self.embedding.tiers.items()
        }
        return self.model_copy(update={"data": data, "embedding": self.embedding.model_copy(update={"tiers": tiers}), "device": device})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=140)


def expand(text: str) -> str:
    """Replace `$NAME` and `${NAME}`; raises SpecError for a variable that is not set.

    >>> os.environ["HERE"] = "/data"
    >>> expand("${HERE}/frappe_x1")
    '/data/frappe_x1'
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise SpecError(f"{text!r}: environment variable {name} is not set; set it, or say where the data lie: --set data.dir=...")
        return os.environ[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)


def apply_override(mapping: dict[str, Any], text: str) -> None:
    """Set one key, `a.b=c`, in nested mappings and lists; c is YAML. Keys are checked later, when the recipe is parsed.

    >>> mapping = {"schedule": {"epochs": 3}, "spec": {"features": [{"name": "user"}]}}
    >>> apply_override(mapping, "schedule.lr={kind: warmup, steps: 10}")
    >>> apply_override(mapping, "spec.features.0.name=u")
    >>> mapping
    {'schedule': {'epochs': 3, 'lr': {'kind': 'warmup', 'steps': 10}}, 'spec': {'features': [{'name': 'u'}]}}
    """
    key, sign, raw = text.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise SpecError(f"--set {text!r}: has no form key=value, e.g. schedule.epochs=3")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {text!r}: {raw!r} is not valid YAML: {yaml_problem(error, raw)[1]}") from None
    node: Any = mapping
    for i, part in enumerate(parts):
        place = ".".join(parts[:i])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise SpecError(f"--set {text!r}: {place} is a list of {len(node)}; {part!r} is no index below {len(node)}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise SpecError(f"--set {text!r}: {place} is {node!r:.80}, it has no key {part!r}")
        if i == len(parts) - 1:
            node[index] = value
        elif isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]


def _read_spec(name: str, base: Path, mapping: dict[str, Any]) -> dict[str, Any]:
    data = mapping.get("data")
    folders = [base]
    if isinstance(data, dict) and isinstance(data.get("dir"), str):
        folders.append(Path(expand(data["dir"])))
    tried = [folder / expand(name) for folder in folders]
    for path in tried:
        if path.is_file():
            return read_mapping(path)
    raise SpecError(f"spec: {name!r} is no file; tried {', '.join(map(str, tried))}")


def _from_python(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SpecError(f"{file}: cannot be read (No such file or directory)")
    make = runpy.run_path(str(file)).get("recipe")
    made = make() if callable(make) else None
    if not isinstance(made, Recipe):
        raise SpecError(f"{file}: defines no function recipe() that returns a Recipe (got {type(made).__name__})")
    return made.model_dump(mode="json")
