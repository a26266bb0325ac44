"""Requests as JSON that a person writes: `ninerank rank --request r.json`, the gateway; `model` and `version` where others must not answer.

{"user": {"user_id": "u7", "age": 31.0},
 "ids": ["a", "b"],
 "items": [{"item_id": "a", "price": 1.5}, {"item_id": "b", "price": 2.0}]}
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ninerank.config import Config
from ninerank.errors import RequestError

if TYPE_CHECKING:
    from ninerank.predictor.client import RankResult
    from ninerank.proto.v1 import predictor_pb2 as pb

__all__ = ["RequestFile", "ScoreFile", "answer", "example_request"]


class RequestFile(Config):
    """user: feature -> value. items: feature -> values, or one mapping a candidate. ids: one a candidate. One of the two is needed.

    model, version: those that must answer; a server of others refuses. Default: whatever is served. tasks, explain_top, priority,
    session: as `PredictorClient.rank` takes them.
    """

    user: dict[str, Any]
    items: dict[str, list[Any]] | list[dict[str, Any]] | None = None
    ids: list[str] | list[int] | None = None
    top_k: int | None = Field(default=None, ge=0)
    timeout_ms: int | None = Field(default=None, ge=1)
    request_id: str = ""
    model: str = ""
    version: str = ""
    tasks: tuple[str, ...] = ()
    explain_top: int = Field(default=0, ge=0, lt=1 << 32)
    priority: Literal["normal", "high", "low"] = "normal"
    session: str = ""

    @classmethod
    def from_text(cls, text: str, what: str) -> "RequestFile":
        """Request from JSON text; raises RequestError that names `what` for text that is none, SpecError for unknown keys."""
        return cls.parse(_json(text, what), what)

    def message(self) -> "pb.RankRequest":
        """The message of the rank call; raises RequestError for values that cannot be sent."""
        from ninerank.predictor.client import build_request, priority_of

        request = build_request(self.user, self.items, ids=self.ids, top_k=self.top_k)
        request.request_id, request.model_name, request.model_version = self.request_id, self.model, self.version
        request.timeout_ms, request.explain_top, request.session = self.timeout_ms or 0, self.explain_top, self.session
        request.tasks.extend(self.tasks)
        request.priority = priority_of(self.priority)
        return request

    def to_text(self) -> str:
        """JSON text; keys at their default are left out."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=2, ensure_ascii=False)


class ScoreFile(Config):
    """rows: columns of values, or one mapping a row, user and item features side by side. tasks: those wanted, all by default."""

    rows: dict[str, list[Any]] | list[dict[str, Any]]
    timeout_ms: int | None = Field(default=None, ge=1)
    request_id: str = ""
    model: str = ""
    version: str = ""
    tasks: tuple[str, ...] = ()
    priority: Literal["normal", "high", "low"] = "normal"

    @classmethod
    def from_text(cls, text: str, what: str) -> "ScoreFile":
        """As of RequestFile."""
        return cls.parse(_json(text, what), what)

    def message(self) -> "pb.ScoreRequest":
        """The message of the score call; raises RequestError for values that cannot be sent."""
        from ninerank.predictor.client import build_score_request, priority_of

        request = build_score_request(self.rows)
        request.request_id, request.model_name, request.model_version = self.request_id, self.model, self.version
        request.timeout_ms = self.timeout_ms or 0
        request.tasks.extend(self.tasks)
        request.priority = priority_of(self.priority)
        return request


def answer(result: "RankResult", ids: Sequence[Any] | None) -> dict[str, Any]:
    """A rank call's result as JSON shows it."""
    defaults = result.defaults_used
    ranked = [
        {"rank": rank, "index": index, "id": None if ids is None else ids[index], "score": float(result.scores[index])}
        for rank, index in enumerate(result.order.tolist(), start=1)
    ]
    shown = {
        "request_id": result.request_id,
        "model_name": result.model_name,
        "model_version": result.model_version,
        "ranked": ranked,
        "scores": result.scores.tolist(),
        "tasks": {name: scores.tolist() for name, scores in result.tasks.items()},
        "timings_us": dict(result.timings_us),
        "defaults_used": {
            "user_columns": list(defaults.user_columns),
            "item_columns": list(defaults.item_columns),
            "unknown_candidates": list(defaults.unknown_candidates),
        },
    }
    return shown | ({"explanations": result.explanations} if result.explanations else {})


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what}: is not valid JSON: {error}") from None


def example_request(bundle_dir: str | Path, num_candidates: int = 10) -> RequestFile:
    """Request made of a bundle's golden rows: the first row's user with the first candidates that differ."""
    from ninerank.predictor.bundle import Bundle  # loads torch, which sending a request does without
    from ninerank.predictor.cache.entities import default_item_key
    from ninerank.predictor.request import RequestSchema

    bundle = Bundle.load(bundle_dir)
    schema, rows = RequestSchema.of(bundle.spec), bundle.golden.rows
    user = rows.select(schema.request.names).slice(0, 1).to_pylist()[0]
    items = {json.dumps(item, sort_keys=True): item for item in rows.select(schema.item.names).to_pylist()}
    key = default_item_key(bundle.spec)
    if key is not None:
        items = {item[key]: item for item in items.values() if item[key] is not None} or items
    chosen = list(items.values())[:num_candidates]
    ids = None if key is None or any(item[key] is None for item in chosen) else [item[key] for item in chosen]
    return RequestFile(user=_present(user), items=[_present(item) for item in chosen], ids=ids)


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
