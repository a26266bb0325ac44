"""What a comparison is decided by, as YAML."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config, read_mapping

__all__ = ["METRICS", "Guardrails", "MetricName", "Rules"]

MetricName = Literal["auc", "gauc", "logloss", "ne", "ndcg"]
# Name -> whether more is better.
METRICS: dict[MetricName, bool] = {"auc": True, "gauc": True, "logloss": False, "ne": False, "ndcg": True}


class Guardrails(Config):
    """Bounds that B must keep; None: not looked at.

    min_pcoc, max_pcoc: predicted over observed positives. max_ece: calibration error. max_latency_ratio: 99th percentile of B's time a
    request over A's. min_coverage_ratio: items that B shows among the first k over those of A. max_default_share: candidates that took a
    default for want of a value. no_worse_slice: no slice may be worse by the primary metric, after correction for many slices.
    """

    min_pcoc: float | None = Field(default=0.9, ge=0)
    max_pcoc: float | None = Field(default=1.1, ge=0)
    max_ece: float | None = Field(default=None, ge=0, le=1)
    max_latency_ratio: float | None = Field(default=1.5, gt=0)
    min_coverage_ratio: float | None = Field(default=0.8, ge=0)
    max_default_share: float | None = Field(default=None, ge=0, le=1)
    no_worse_slice: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_pcoc is not None and self.max_pcoc is not None and self.min_pcoc > self.max_pcoc:
            raise ValueError(f"min_pcoc {self.min_pcoc:g} is above max_pcoc {self.max_pcoc:g}")
        return self


class Rules(Config):
    """primary: the metric that decides. min_effect: a difference as small as this is none worth launching. level: of all intervals.

    horizon: number of requests near which the sequential intervals are tightest; choose it before looking. top_k: of NDCG, coverage and
    samples. max_slices: values shown of each sliced column.
    """

    primary: MetricName = "auc"
    min_effect: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    level: float = Field(default=0.95, gt=0.5, lt=1)
    horizon: int = Field(default=10_000, ge=2)
    top_k: int = Field(default=10, ge=1)
    max_slices: int = Field(default=15, ge=1)
    guardrails: Guardrails = Guardrails()

    @classmethod
    def load(cls, path: str | Path | None) -> "Rules":
        """Rules of a YAML file, the defaults for None; raises SpecError that names key and place."""
        return cls() if path is None else cls.parse(read_mapping(Path(path)), str(path))
