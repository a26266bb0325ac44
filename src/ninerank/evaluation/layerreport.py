"""What a comparison of two places layer by layer found: differences of each layer, the first beyond its budget, a verdict."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ninerank.evaluation.differences import Difference
from ninerank.evaluation.place import Place
from ninerank.predictor.bundle import ROUNDING_TOLERANCE
from ninerank.predictor.engine import BF16_TOLERANCE
from ninerank.predictor.manifest import Manifest

__all__ = ["Budget", "Layer", "LayerReport"]


@dataclass(frozen=True)
class Budget:
    """layer: what a layer's own difference may be, as a share of its largest value. score: what a score may move by."""

    layer: float
    score: float

    @classmethod
    def of(cls, *places: Place) -> "Budget":
        """What rounding in these precisions makes."""
        if any(place.precision != "fp32" for place in places):
            return cls(layer=2e-2, score=BF16_TOLERANCE + ROUNDING_TOLERANCE)
        return cls(layer=1e-5, score=ROUNDING_TOLERANCE)


@dataclass(frozen=True)
class Layer:
    """name: of the node in the bundle's graph, or of an input. operator: `lookup` for inputs. weights: that it reads.

    own, in_all: largest over all batches. batch: where the own difference is largest. allowed: budget of the own relative difference.
    """

    name: str
    operator: str
    weights: tuple[str, ...]
    own: Difference
    in_all: Difference
    batch: str
    allowed: float

    @property
    def passed(self) -> bool:
        return self.own.relative <= self.allowed


@dataclass(frozen=True)
class LayerReport:
    """layers: in the order in which they run. scores: largest difference of a score. kernels: dispatches of each side by operator.

    backends: largest difference of each side's scores as its backend runs the graph from those of its layers run one by one.
    """

    bundle: str
    manifest: Manifest
    places: tuple[str, str]
    devices: tuple[str, str]
    runs_by: tuple[str, str]
    budget: Budget
    batches: tuple[str, ...]
    layers: tuple[Layer, ...]
    scores: float
    backends: tuple[float, float]
    kernels: tuple[dict[str, int], dict[str, int]]

    @property
    def first(self) -> Layer | None:
        """The first layer that goes beyond its budget."""
        return next((layer for layer in self.layers if not layer.passed), None)

    @property
    def passed(self) -> bool:
        return self.first is None and max(self.scores, *self.backends) <= self.budget.score

    @property
    def verdict(self) -> str:
        """One sentence."""
        (a, b), allowed = self.places, f"{self.budget.score:.3g} is allowed"
        if self.first is not None:
            own = self.first
            by = f"by {own.own.relative:.3g} of its largest value, {own.allowed:.3g} is allowed"
            return f"{b} diverges from {a} first at {_titled(own)}: {by} ({own.batch})"
        for place, difference in zip(self.places, self.backends, strict=True):
            if not difference <= self.budget.score:
                return f"{place}: scores of its backend differ by {difference:.3g} from those of its layers one by one, {allowed}"
        if not self.scores <= self.budget.score:
            grown = max(self.layers, key=lambda layer: layer.in_all.relative)
            where = f"no layer alone goes beyond its budget, and the largest difference in all is at {_titled(grown)}"
            return f"scores of {b} differ from {a} by {self.scores:.3g}, {allowed}; {where}"
        return f"{b} agrees with {a}: every layer is within its budget, scores differ by at most {self.scores:.3g}, {allowed}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is infinite is null."""
        return {
            "bundle": self.bundle,
            "model": self.manifest.model_name,
            "version": self.manifest.model_version,
            "places": list(self.places),
            "devices": list(self.devices),
            "backends": list(self.runs_by),
            "batches": list(self.batches),
            "budget": asdict(self.budget),
            "passed": self.passed,
            "verdict": self.verdict,
            "first_divergent": None if self.first is None else self.first.name,
            "largest_score_difference": _finite(self.scores),
            "backend_score_differences": [_finite(value) for value in self.backends],
            "kernels": list(self.kernels),
            "layers": [
                {
                    "name": layer.name,
                    "operator": layer.operator,
                    "weights": list(layer.weights),
                    "own": {key: _finite(value) for key, value in vars(layer.own).items()},
                    "in_all": {key: _finite(value) for key, value in vars(layer.in_all).items()},
                    "batch": layer.batch,
                    "allowed": layer.allowed,
                    "passed": layer.passed,
                }
                for layer in self.layers
            ],
        }


def _titled(layer: Layer) -> str:
    reads = f", weights {', '.join(layer.weights)}" if layer.weights else ""
    return f"{layer.name!r} ({layer.operator}{reads})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
