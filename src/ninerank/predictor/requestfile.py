"""A rank request as a file that a person writes: `ninerank rank --request r.json`; `model` and `version` where others must not answer.

{"user": {"user_id": "u7", "age": 31.0},
 "ids": ["a", "b"],
 "items": [{"item_id": "a", "price": 1.5}, {"item_id": "b", "price": 2.0}]}
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from ninerank.config import Config
from ninerank.errors import RequestError

__all__ = ["RequestFile", "example_request"]


class RequestFile(Config):
    """user: feature -> value. items: feature -> values, or one mapping a candidate. ids: one a candidate. One of the two is needed.

    model, version: those that must answer; a server of others refuses. Default: whatever is served.
    """

    user: dict[str, Any]
    items: dict[str, list[Any]] | list[dict[str, Any]] | None = None
    ids: list[str] | list[int] | None = None
    top_k: int | None = Field(default=None, ge=0)
    timeout_ms: int | None = Field(default=None, ge=1)
    request_id: str = ""
    model: str = ""
    version: str = ""

    @classmethod
    def from_text(cls, text: str, what: str) -> "RequestFile":
        """Request from JSON text; raises RequestError that names `what` for text that is none, SpecError for unknown keys."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RequestError(f"{what}: is not valid JSON: {error}") from None
        return cls.parse(data, what)

    def to_text(self) -> str:
        """JSON text; keys at their default are left out."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=2, ensure_ascii=False)


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
