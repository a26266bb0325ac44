"""Ninerank trains click-through-rate and ranking models on CPU, NVIDIA GPU and Ascend NPU, and serves them.

Importing it loads nothing heavy: the public names below load their modules when they are first asked for.
"""

import os as _os
import sys as _sys
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ninerank.config import Config as Config
    from ninerank.device import Device as Device
    from ninerank.embedding.collection import EmbeddingConfig as EmbeddingConfig
    from ninerank.errors import NinerankError as NinerankError
    from ninerank.evaluation.evaluate import evaluate as evaluate
    from ninerank.evaluation.replay import replay as replay
    from ninerank.evaluation.scorer import open_scorer as open_scorer
    from ninerank.features.batch import Batch as Batch
    from ninerank.features.fit import fit as fit
    from ninerank.features.reader import Reader as Reader
    from ninerank.features.spec import FeatureSpec as FeatureSpec
    from ninerank.features.spec import IdFeature as IdFeature
    from ninerank.features.spec import NumericFeature as NumericFeature
    from ninerank.features.spec import SequenceFeature as SequenceFeature
    from ninerank.features.transform import Transform as Transform
    from ninerank.predictor.bundle import Bundle as Bundle
    from ninerank.predictor.bundle import export_bundle as export_bundle
    from ninerank.predictor.client import PredictorClient as PredictorClient
    from ninerank.predictor.engine import Engine as Engine
    from ninerank.predictor.request import RankInput as RankInput
    from ninerank.towers.model import RankingModel as RankingModel
    from ninerank.towers.registry import build_model as build_model
    from ninerank.training.recipe import Recipe as Recipe
    from ninerank.training.run import load_run as load_run
    from ninerank.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_PUBLIC = {
    "Batch": "ninerank.features.batch",
    "Bundle": "ninerank.predictor.bundle",
    "Config": "ninerank.config",
    "Device": "ninerank.device",
    "EmbeddingConfig": "ninerank.embedding.collection",
    "Engine": "ninerank.predictor.engine",
    "FeatureSpec": "ninerank.features.spec",
    "IdFeature": "ninerank.features.spec",
    "NinerankError": "ninerank.errors",
    "NumericFeature": "ninerank.features.spec",
    "PredictorClient": "ninerank.predictor.client",
    "RankInput": "ninerank.predictor.request",
    "RankingModel": "ninerank.towers.model",
    "Reader": "ninerank.features.reader",
    "Recipe": "ninerank.training.recipe",
    "SequenceFeature": "ninerank.features.spec",
    "Trainer": "ninerank.training.trainer",
    "Transform": "ninerank.features.transform",
    "build_model": "ninerank.towers.registry",
    "evaluate": "ninerank.evaluation.evaluate",
    "export_bundle": "ninerank.predictor.bundle",
    "fit": "ninerank.features.fit",
    "load_run": "ninerank.training.run",
    "open_scorer": "ninerank.evaluation.scorer",
    "replay": "ninerank.evaluation.replay",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - the keys are names

# With torch_npu installed and CANN missing, `import torch` itself fails while it loads backends on its own accord.
# `ninerank.device` imports torch_npu when an NPU is asked for, so torch need not; whoever set the variable keeps it.
if "torch" not in _sys.modules and _find_spec("torch_npu") is not None:
    _os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        value = getattr(_import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ninerank' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
