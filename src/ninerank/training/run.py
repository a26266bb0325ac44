"""The run directory: what a training run leaves behind, and how it is read again.

    RUN/recipe.yaml    resolved        RUN/history.csv     one line an interval       RUN/checkpoints/step-<n>/
    RUN/spec.json      fitted          RUN/metrics.json    of the best epoch          RUN/best/
    RUN/versions.json  what ran

Whatever is replaced while a run goes on is written beside and renamed.
"""

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ninerank import __version__
from ninerank.config import read_mapping
from ninerank.device import Device
from ninerank.errors import CheckpointError, SpecError
from ninerank.features.spec import FeatureSpec
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import build_model
from ninerank.training import sealed
from ninerank.training.checkpoint import BestWeights
from ninerank.training.recipe import Recipe
from ninerank.training.saved import fill_best

__all__ = ["Run", "RunDir", "load_run"]

REPLACED = ".replaced"
PACKAGES = ("torch", "numpy", "pyarrow", "numba", "pydantic", "safetensors")
FREE_TO_CHANGE = (
    "schedule.epochs",
    "schedule.max_steps",
    "schedule.early_stopping",
    "checkpoint",
    "log",
    "device",
    "embedding.tiers",
    "sharding",
    "data.dir",
    "data.prefetch",
    "data.test",
)


@dataclass(frozen=True)
class Run:
    """A trained run: best weights in a model on the CPU, in evaluation mode; tiered tables lie in memory like all others."""

    directory: Path
    model: RankingModel
    spec: FeatureSpec
    recipe: Recipe
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class RunDir:
    """Paths of a run directory and the files that are written once."""

    path: Path
    _made: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)  # directories, the inner ones first
    _is_new: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def spec_path(self) -> Path:
        return self.path / "spec.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        return self.path / "best"

    def create(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Make the directory; raises SpecError where something is there already, unless it is a run and `overwrite` says it may go.

        What a run left that ended before it saved anything is replaced without a word.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            if not self.recipe_path.is_file():
                raise SpecError(f"{self.path}: exists and is no run directory; choose another --out")
            if not overwrite and any(path.exists() for path in (self.checkpoints, self.best, self.path / REPLACED)):
                choices = "go on with it (--resume), replace it (--overwrite) or choose another --out"
                raise SpecError(f"{self.path}: holds a run already; {choices}")
            self._set_aside()
        self._made[:] = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self._is_new[:] = [True]
        with self.undone_on_failure():
            self.path.mkdir(parents=True, exist_ok=True)
            sealed.replace_file(self.recipe_path, recipe.to_yaml().encode())

    @contextmanager
    def undone_on_failure(self, has_begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Take back what `create` made if what follows fails before training has begun: a run that was to be replaced stays as it was."""
        try:
            yield
        except BaseException:
            if self._is_new and not has_begun():
                self._undo()
            raise

    def settle(self) -> None:
        """Delete the run that this one replaces."""
        if self._is_new:
            shutil.rmtree(self.path / REPLACED, ignore_errors=True)

    def _set_aside(self) -> None:
        """Move what the directory holds out of the new run's way; the directory itself may be a link or a mounted disk."""
        shutil.rmtree(self.path / REPLACED, ignore_errors=True)
        old = list(self.path.iterdir())
        (self.path / REPLACED).mkdir()
        for path in old:
            path.rename(self.path / REPLACED / path.name)

    def _undo(self) -> None:
        aside = self.path / REPLACED
        for path in list(self.path.iterdir()) if self.path.is_dir() else ():
            if path != aside:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if aside.is_dir():
            for path in aside.iterdir():
                path.rename(self.path / path.name)
            aside.rmdir()
        with suppress(OSError):  # somebody put something there
            for path in self._made:
                path.rmdir()
        self._is_new.clear()

    def reopen(self, recipe: Recipe) -> None:
        """Check that `recipe` goes on with this run; raises CheckpointError naming the first key that differs and must not."""
        own = self.recipe()
        difference = _first_difference(own.model_dump(mode="json"), recipe.model_dump(mode="json"), "")
        if difference is not None:
            key, was, now = difference
            said = f"was trained with {key} = {str(was)[:80]}, the recipe now says {str(now)[:80]}"
            raise CheckpointError(f"{self.path}: {said}; use the same recipe, or another --out")
        sealed.replace_file(self.recipe_path, recipe.to_yaml().encode())

    def recipe(self) -> Recipe:
        """The recipe of this run; raises CheckpointError where there is none."""
        if not self.recipe_path.is_file():
            raise CheckpointError(f"{self.path}: is no run directory, recipe.yaml is missing")
        return Recipe.load(self.recipe_path)

    def spec(self) -> FeatureSpec:
        if not self.spec_path.is_file():
            raise CheckpointError(f"{self.path}: spec.json is missing, so nothing was trained here yet")
        return FeatureSpec.load(self.spec_path)

    def write_versions(self, device: Device) -> None:
        """What ran: versions, device, threads. Equal bytes from equal seeds hold for equal versions and threads."""
        found = {"ninerank": __version__, "python": platform.python_version()}
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "unknown"
        data = {
            "versions": found,
            "platform": platform.platform(),
            "device": device.name,
            "device_reason": device.reason,
            "num_threads": torch.get_num_threads(),
        }
        sealed.replace_file(self.path / "versions.json", sealed.json_bytes(data))

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        sealed.replace_file(self.metrics_path, sealed.json_bytes(metrics))


def load_run(run_dir: str | Path) -> Run:
    """Best weights of a run, with its fitted spec, recipe and metrics (empty while it is still training).

    Raises CheckpointError for a directory that is no run, or weights that are missing, corrupt or of another spec.
    """
    run = RunDir(Path(run_dir))
    recipe, spec = run.recipe(), run.spec()
    model = build_model(recipe.model, spec, recipe.embedding.untiered, seed=recipe.seed)
    fill_best(BestWeights(run.best, spec_digest=spec.digest), model)
    metrics = read_mapping(run.metrics_path) if run.metrics_path.is_file() else {}
    return Run(run.path, model.eval(), spec, recipe, metrics)


def _first_difference(was: Any, now: Any, place: str) -> tuple[str, Any, Any] | None:
    if place in FREE_TO_CHANGE or was == now:
        return None
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            found = _first_difference(was.get(key), now.get(key), f"{place}.{key}" if place else key)
            if found is not None:
                return found
        return None
    return place, was, now
