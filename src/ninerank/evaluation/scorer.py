"""A run or a bundle behind one method: log rows in, scores out.

Shape legend: B rows, T tasks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ninerank.device import Device
from ninerank.errors import DataError
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform

if TYPE_CHECKING:
    from ninerank.predictor.engine import Engine
    from ninerank.training.run import Run

__all__ = ["BundleScorer", "ModelInfo", "RunScorer", "Scorer", "open_scorer"]


@dataclass(frozen=True)
class ModelInfo:
    """What was evaluated. kind: run or bundle."""

    source: str
    kind: str
    name: str
    version: str
    spec_digest: str
    device: str


class Scorer(ABC):
    """Scores log rows. info: what it is. spec: which columns it reads."""

    info: ModelInfo
    spec: FeatureSpec

    @abstractmethod
    def score(self, rows: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Probabilities, float32 (B, T); raises DataError for rows that do not have the spec's columns."""


class RunScorer(Scorer):
    """Best weights of a training run, in float32."""

    def __init__(self, run: "Run", device: Device) -> None:
        self.spec = run.spec
        self.info = ModelInfo(str(run.directory), "run", run.recipe.model.name, run.directory.resolve().name, run.spec.digest, device.name)
        self._device = device.torch_device
        self._model = run.model.to(self._device).eval()
        self._transform = Transform(run.spec)

    def score(self, rows: pa.RecordBatch) -> npt.NDArray[np.float32]:
        batch = self._transform.batch(rows, labels=False)
        with torch.inference_mode():
            logits_BT = self._model(self._model.embedding.prepare(batch).to(self._device))
            scores_BT: npt.NDArray[np.float32] = torch.sigmoid(logits_BT.to(torch.float32)).cpu().numpy()
        return scores_BT


class BundleScorer(Scorer):
    """A bundle through the engine that serves it."""

    def __init__(self, engine: "Engine", source: str) -> None:
        manifest = engine.manifest
        self.spec = engine.spec
        self.info = ModelInfo(source, "bundle", manifest.model_name, manifest.model_version, manifest.spec_digest, engine.device.name)
        self._engine = engine

    def score(self, rows: pa.RecordBatch) -> npt.NDArray[np.float32]:
        return self._engine.score(rows)


def open_scorer(path: str | Path, device: str = "auto") -> Scorer:
    """Scorer of the run or bundle in directory `path`.

    Raises DataError for a directory that is neither, and what loading raises: CheckpointError, BundleError, DeviceError.
    """
    directory = Path(path)
    if (directory / "manifest.json").is_file():
        from ninerank.predictor.engine import Engine

        return BundleScorer(Engine.load(directory, device), str(path))
    if (directory / "recipe.yaml").is_file():
        from ninerank.training.run import load_run

        return RunScorer(load_run(directory), Device.resolve(device))
    state = "is neither: it has no recipe.yaml and no manifest.json" if directory.is_dir() else "is no directory"
    raise DataError(f"{path}: {state}; a run (`ninerank train --out`) or a bundle (`ninerank export`) is needed")
