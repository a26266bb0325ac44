"""From two bundles and a log to a comparison."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ninerank.evaluation.compare.rules import Rules
from ninerank.evaluation.compare.samples import explained
from ninerank.evaluation.compare.scoring import CompareJob, score_both
from ninerank.evaluation.compare.verdict import Comparison, compare, side_facts
from ninerank.evaluation.mapmerge import Where

if TYPE_CHECKING:
    from ninerank.predictor.engine import Engine

__all__ = ["compare_bundles"]


def compare_bundles(
    job: CompareJob, rules: Rules, *, processes: int = 1, where: Where = "local", on_requests: Callable[[int], None] = lambda _: None
) -> Comparison:
    """Score the log by both, compare. Raises what scoring raises."""
    from ninerank.predictor.engine import Engine

    compared = score_both(job, processes=processes, where=where, on_requests=on_requests)
    b = Engine.load(job.b, job.device)
    a = None if job.a is None else Engine.load(job.a, job.device)
    names = ("scores as served" if a is None else _name(a), _name(b))
    facts = side_facts({} if a is None else _facts(a, str(job.a)), _facts(b, str(job.b)))
    samples = explained(compared.changed, a, b)
    return compare(compared, rules, names=names, log=str(job.log), task=b.manifest.tasks[0], facts=facts, samples=samples)


def _name(engine: "Engine") -> str:
    return f"{engine.manifest.model_name} {engine.manifest.model_version}"


def _facts(engine: "Engine", source: str) -> dict[str, str]:
    manifest = engine.manifest
    return {
        "bundle": source,
        "model": manifest.model_name,
        "version": manifest.model_version,
        "spec digest": f"{manifest.spec_digest[:16]}…",
        "features": ", ".join(feature.name for feature in engine.spec.features),
        "tasks": ", ".join(manifest.tasks),
        "embedding dims": ", ".join(f"{name} {dim}" for name, dim in manifest.groups.items()),
        "table types": ", ".join(sorted({manifest.table_dtypes.get(name, "fp32") for name in manifest.groups})),
        "passes": ", ".join(record.name for record in manifest.passes if record.fired) if manifest.passes else "none",
    }
