"""Frozen, typed configuration: unknown keys are refused with the nearest valid key.

A leaf beside `device` and `metrics`, since specs, recipes and server settings all stand on it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from ninerank.errors import SpecError, nearest

__all__ = ["Config", "read_mapping"]

MAX_CONFIG_BYTES = 1 << 30
# The safe loader of libyaml where PyYAML brings it: about three times as fast, which a spec with large vocabularies needs.
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Config(BaseModel):
    """Base of all configuration objects.

    >>> class Point(Config):
    ...     x: int = 0
    >>> Point.parse({"x": 3}, "point")
    Point(x=3)
    >>> Point.parse({"y": 3}, "point")
    Traceback (most recent call last):
    ...
    ninerank.errors.SpecError: point: unknown key 'y'; valid: x
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @classmethod
    def parse(cls, data: object, what: str) -> Self:
        """Validate `data`; raises SpecError that names `what`, the place, the value and what is allowed."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError(_explain(cls, error, what)) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file; raises SpecError for a file that cannot be read or does not validate."""
        return cls.parse(read_mapping(path), str(path))

    def canonical_json(self) -> str:
        """JSON with sorted keys and no spaces: equal configurations give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Top-level mapping of a YAML or JSON file (`.json` is read as JSON, anything else as safe YAML)."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise SpecError(f"{file}: {file.stat().st_size} bytes is too large for a configuration; at most {MAX_CONFIG_BYTES}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read ({error.strerror if isinstance(error, OSError) else error})") from None
    try:
        data = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=SAFE_LOADER)  # noqa: S506 (it is a safe one)
        if file.suffix == ".json" and "\\ud" in text.lower():
            # Half a surrogate pair, written as an escape, is no character: nothing could be written or hashed with it.
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, yaml.YAMLError) as error:
        raise SpecError(f"{file}: is not valid {'JSON' if file.suffix == '.json' else 'YAML'}: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{file}: holds {type(data).__name__} at the top, a mapping is needed")
    return data


def _explain(model: type[BaseModel], error: ValidationError, what: str) -> str:
    return "; ".join(_explain_one(model, item, what) for item in error.errors()[:5])


def _explain_one(model: type[BaseModel], item: Mapping[str, Any], what: str) -> str:
    place = [what, *(str(part) for part in item["loc"])]
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(place[:-1])}: unknown key {place[-1]!r}; {nearest(place[-1], _keys_at(model, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{'.'.join(place[:-1])}: key {place[-1]!r} is missing"
    value, message = repr(item["input"]), item["msg"].removeprefix("Value error, ")
    return f"{'.'.join(place)}: {message} (value {value if len(value) <= 80 else value[:77] + '...'})"


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the (possibly nested) model at `loc`; union members are met by their tag."""
    models = [model]
    for part in loc:
        inner = [
            m
            for parent in models
            if isinstance(part, str) and part in parent.model_fields
            for m in _models_in(parent.model_fields[part].annotation)
        ]
        tagged = [m for m in models if part in _tags(m)]
        models = inner or tagged or models
    return sorted({key for m in models for key in m.model_fields})


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ()) or ()
    origin = getattr(annotation, "__value__", None)
    return [m for a in (*arguments, origin) if a is not None for m in _models_in(a)]


def _tags(model: type[BaseModel]) -> set[object]:
    """Literal values of a model's `kind` or `name` field: the tag that selects it in a union."""
    return {
        value
        for key in ("kind", "name")
        if key in model.model_fields
        for value in getattr(model.model_fields[key].annotation, "__args__", ()) or ()
    }
