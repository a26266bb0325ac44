"""The decision: what the differences and the guardrails say together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ninerank.evaluation.compare.differences import Difference, differences, sliced
from ninerank.evaluation.compare.rules import METRICS, MetricName, Rules
from ninerank.evaluation.compare.samples import Sample
from ninerank.evaluation.compare.scoring import Compared
from ninerank.evaluation.quality import Quality, finite

__all__ = ["Comparison", "Guardrail", "compare", "side_facts"]

Outcome = Literal["b_better", "a_better", "no_difference"]


@dataclass(frozen=True)
class Guardrail:
    """One bound: what was found (nan: could not be told, which does not pass), and what is allowed."""

    name: str
    found: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.low <= self.found <= self.high

    @property
    def allowed(self) -> str:
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "found": finite(self.found), "allowed": self.allowed, "passed": self.passed}


@dataclass(frozen=True)
class Comparison:
    """Two models compared. names: who A and B are. facts: what is known of each, by name of the fact."""

    names: tuple[str, str]
    facts: dict[str, tuple[str, str]]
    log: str
    rules: Rules
    compared: Compared
    metrics: dict[MetricName, Difference]
    slices: dict[str, dict[str, Difference]]
    qualities: tuple[Quality, Quality]
    guardrails: tuple[Guardrail, ...]
    samples: tuple[Sample, ...]
    task: str

    @property
    def primary(self) -> Difference:
        return self.metrics[self.rules.primary]

    @property
    def outcome(self) -> Outcome:
        """By the always valid interval of the primary metric, whose smallest difference worth a launch is min_effect."""
        low, high = self.primary.always.low, self.primary.always.high
        if not METRICS[self.rules.primary]:
            low, high = -high, -low
        if low > self.rules.min_effect:
            return "b_better"
        return "a_better" if high < -self.rules.min_effect else "no_difference"

    @property
    def launch(self) -> bool:
        """Whether B is better and keeps every guardrail."""
        return self.outcome == "b_better" and all(guardrail.passed for guardrail in self.guardrails)

    def sentence(self) -> str:
        """The verdict for a reader who knows no metric."""
        found, failed = self.primary, [guardrail.name for guardrail in self.guardrails if not guardrail.passed]
        percent = f"{self.rules.level:.0%}"
        interval = f"{found.fixed.value:+.5f}, {percent} interval {found.always.low:+.5f} to {found.always.high:+.5f}"
        held = f"; but it fails: {', '.join(failed)}" if failed else ""
        if self.outcome == "b_better":
            return f"B is better: {self.rules.primary} differs by {interval}{held}."
        if self.outcome == "a_better":
            return f"A is better: {self.rules.primary} of B differs by {interval}."
        return (
            f"No difference is shown: {self.rules.primary} differs by {interval}, which {'holds' if self._holds_zero() else 'is below'} "
            + ("zero." if self._holds_zero() else f"what is worth a launch ({self.rules.min_effect:g}).")
        )

    def _holds_zero(self) -> bool:
        return not (self.primary.always.low > 0 or self.primary.always.high < 0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "outcome": self.outcome,
            "launch": self.launch,
            "sentence": self.sentence(),
            "a": self.names[0],
            "b": self.names[1],
            "facts": {name: list(values) for name, values in self.facts.items()},
            "log": self.log,
            "task": self.task,
            "rules": self.rules.model_dump(mode="json"),
            "requests": self.compared.num_requests,
            "candidates": self.compared.num_candidates,
            "labelled": len(self.compared.label_M),
            "labels": self.compared.joined.as_dict(),
            "absent_columns": {name: list(columns) for name, columns in self.compared.absent.items()},
            "metrics": {name: found.as_dict() for name, found in self.metrics.items()},
            "slices": {column: {name: own.as_dict() for name, own in found.items()} for column, found in self.slices.items()},
            "quality": dict(zip("ab", (quality.summary().as_dict() for quality in self.qualities), strict=True)),
            "guardrails": [guardrail.as_dict() for guardrail in self.guardrails],
            "samples": [sample.as_dict() for sample in self.samples],
        }


def compare(
    compared: Compared,
    rules: Rules,
    *,
    names: tuple[str, str],
    log: str = "",
    task: str = "label",
    facts: dict[str, tuple[str, str]] | None = None,
    samples: tuple[Sample, ...] = (),
) -> Comparison:
    """Measure, break down, hold against the rules."""
    qualities = (Quality(), Quality())
    for quality, score_M in zip(qualities, (compared.a_M, compared.b_M), strict=True):
        quality.update(compared.label_M, score_M, None, compared.request_M)
    slices = sliced(compared, rules)
    guardrails = tuple(_guardrails(compared, rules, qualities[1], slices))
    metrics = differences(compared, rules)
    return Comparison(names, facts or {}, log, rules, compared, metrics, slices, qualities, guardrails, samples, task)


def _guardrails(compared: Compared, rules: Rules, b: Quality, slices: dict[str, dict[str, Difference]]) -> Iterator[Guardrail]:
    bounds, summary = rules.guardrails, b.summary()
    if bounds.min_pcoc is not None or bounds.max_pcoc is not None:
        low, high = -math.inf if bounds.min_pcoc is None else bounds.min_pcoc, math.inf if bounds.max_pcoc is None else bounds.max_pcoc
        yield Guardrail("PCOC of B", summary.pcoc, low, high)
    if bounds.max_ece is not None:
        yield Guardrail("ECE of B", summary.ece, -math.inf, bounds.max_ece)
    if bounds.max_latency_ratio is not None and not np.isnan(compared.a_us_R).any():
        a_us, b_us = (float(np.quantile(times, 0.99)) for times in (compared.a_us_R, compared.b_us_R))
        yield Guardrail("time a request, p99, B / A", b_us / a_us, -math.inf, bounds.max_latency_ratio)
    if bounds.min_coverage_ratio is not None and compared.a_items:
        yield Guardrail("items shown, B / A", len(compared.b_items) / len(compared.a_items), bounds.min_coverage_ratio, math.inf)
    if bounds.max_default_share is not None:
        share = compared.num_defaulted / compared.num_candidates
        yield Guardrail("share of candidates with defaults", share, -math.inf, bounds.max_default_share)
    if bounds.no_worse_slice and slices:
        worse = sum(found.gain < 0 and found.adjusted < 1 - rules.level for own in slices.values() for found in own.values())
        yield Guardrail("slices that are worse", float(worse), -math.inf, 0)


def side_facts(a: dict[str, str], b: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Facts of both sides by name, those of A first."""
    return {name: (a.get(name, "–"), b.get(name, "–")) for name in dict.fromkeys([*a, *b])}
