"""Requests whose scores moved most, with what each feature did to the scores of the candidates that changed.

A feature's contribution is the score less the score with that feature at its default.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ninerank.evaluation.compare.scoring import Changed, conformed
from ninerank.evaluation.quality import finite

if TYPE_CHECKING:
    from ninerank.predictor.engine import Engine

__all__ = ["Sample", "SampleCandidate", "explained"]

SHOWN_CANDIDATES, SHOWN_FEATURES = 4, 4
T = TypeVar("T")


@dataclass(frozen=True)
class SampleCandidate:
    """One candidate. a_place, b_place: from 1. a_why, b_why: features that moved each score most, with by how much."""

    name: str
    label: float
    a: float
    b: float
    a_place: int
    b_place: int
    a_why: tuple[tuple[str, float], ...]
    b_why: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Sample:
    """A request, the user's features as text, and the candidates whose scores moved most."""

    request_id: str
    num_candidates: int
    user: dict[str, str]
    candidates: tuple[SampleCandidate, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        for candidate in found["candidates"]:
            candidate["label"] = finite(candidate["label"])
        return found


def explained(changed: Sequence[Changed], a: "Engine | None", b: "Engine") -> tuple[Sample, ...]:
    """Samples of the requests that changed; a None: A's scores were served, and cannot be explained."""
    return tuple(_sample(own, a, b) for own in changed if own.change > 0)


def _sample(own: Changed, a: "Engine | None", b: "Engine") -> Sample:
    request = own.request
    moved_K = np.argsort(-np.abs(own.a_N.astype(np.float64) - own.b_N), kind="stable")[:SHOWN_CANDIDATES]
    places = []
    for score_N in (own.a_N, own.b_N):
        place_N = np.empty(len(score_N), np.int64)
        place_N[np.argsort(-score_N, kind="stable")] = np.arange(1, len(score_N) + 1)
        places.append(place_N)
    whys = [_why(engine, own, moved_K, score_N) for engine, score_N in ((a, own.a_N), (b, own.b_N))]
    candidates = tuple(
        SampleCandidate(
            name=f"#{k}" if request.candidate_ids is None else str(request.candidate_ids[k].as_py()),
            label=float(own.label_N[k]),
            a=float(own.a_N[k]),
            b=float(own.b_N[k]),
            a_place=int(places[0][k]),
            b_place=int(places[1][k]),
            a_why=whys[0][n],
            b_why=whys[1][n],
        )
        for n, k in enumerate(moved_K.tolist())
    )
    user = {name: _short(request.input.user.column(name)[0].as_py()) for name in request.input.user.schema.names}
    return Sample(request.request_id, len(own.a_N), user, candidates)


def _why(engine: "Engine | None", own: Changed, chosen_K: Any, score_N: Any) -> list[tuple[tuple[str, float], ...]]:
    if engine is None:
        return [() for _ in chosen_K]
    from ninerank.predictor.explain import explain

    found = _run(explain(engine, conformed(own.request, engine.schema)[0], chosen_K, score_N[chosen_K], 0))
    largest = np.argsort(-np.abs(found.contributions_KF), axis=1)[:, :SHOWN_FEATURES]
    return [
        tuple((found.features[f], float(contributions[f])) for f in order.tolist() if contributions[f] != 0)
        for order, contributions in zip(largest, found.contributions_KF, strict=True)
    ]


def _run(steps: Generator[None, None, T]) -> T:
    """What a computation in steps returns."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
