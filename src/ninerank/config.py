"""Frozen, typed configuration: unknown keys are refused with the nearest valid key.

A leaf beside `device` and `metrics`, since specs, recipes and server settings all stand on it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from ninerank.errors import SpecError, nearest

__all__ = ["Config", "read_mapping", "yaml_problem"]

MAX_CONFIG_BYTES = 1 << 30
MAX_TOLD = 5
# What pydantic says in words of Python, and what a writer of YAML calls it.
_PHRASES = (
    ("valid tuple|valid list", "list"),
    ("^Tuple should", "List should"),
    (r"valid dictionary( or (instance of \w+|object to extract fields from))?", "mapping"),
)
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
            raise SpecError(_explain(cls, error, what, data)) from None

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
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{file}: cannot be read ({error.strerror if isinstance(error, OSError) else error})") from None
    try:
        data = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=SAFE_LOADER)  # noqa: S506 (it is a safe one)
        if file.suffix == ".json" and "\\ud" in text.lower():
            # Half a surrogate pair, written as an escape, is no character: nothing could be written or hashed with it.
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise SpecError(f"{file}:{error.lineno}:{error.colno}: is not valid JSON: {error.msg}") from None
    except yaml.YAMLError as error:
        place, wrong = yaml_problem(error, text)
        raise SpecError(f"{file}{place}: is not valid YAML: {wrong}") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{file}: is not valid {'JSON' if file.suffix == '.json' else 'YAML'}: {error}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{file}: holds {type(data).__name__} at the top, a mapping is needed")
    return data


def yaml_problem(error: yaml.YAMLError, text: str) -> tuple[str, str]:
    """Place (":line:column", from 1, or "") and cause of a syntax error, in one line.

    >>> text = "a: 1\\nb: [1, 2"
    >>> try:
    ...     _ = yaml.safe_load(text)
    ... except yaml.YAMLError as error:
    ...     yaml_problem(error, text)
    (':2:9', "expected ',' or ']', but got '<stream end>' (while parsing a flow sequence, from line 2 on)")
    """
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return "", " ".join(str(error).split())
    wrong = getattr(error, "problem", None) or "a syntax error"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if line[mark.column : mark.column + 1] == "\t":
        wrong = "a tab; indent with spaces"
    elif getattr(error, "context", None):
        start = getattr(error, "context_mark", None)
        wrong += f" ({error.context}{f', from line {start.line + 1} on' if start is not None else ''})"  # type: ignore[attr-defined]
    return f":{mark.line + 1}:{mark.column + 1}", " ".join(wrong.split())


@dataclass(frozen=True)
class _Place:
    """Where an error lies: `path` as a person writes it in `--set`, names of list elements in brackets. keys: valid ones there."""

    path: str
    keys: list[str]

    def child(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def _explain(model: type[BaseModel], error: ValidationError, what: str, data: object) -> str:
    items = error.errors()
    messages: dict[tuple[str, str], list[str]] = {}  # by place and value, about which the members of a union complain one by one
    for item in items:
        depth = len(item["loc"])
        if item["type"] == "too_short" and any(other["loc"][:depth] == item["loc"] and len(other["loc"]) > depth for other in items):
            continue  # the elements are there, they are wrong
        place, cause, value = _explain_one(model, item, data)
        messages.setdefault((f"{place.path}: " if place.path else "", f" (value {value})" if value else ""), []).append(cause)
    told = [text for (place, value), causes in messages.items() for text in _told(place, causes, value)]
    more = f"; and {len(told) - MAX_TOLD} more" if len(told) > MAX_TOLD else ""
    return f"{what}: {'; '.join(told[:MAX_TOLD])}{more}"


def _told(place: str, causes: list[str], value: str) -> list[str]:
    """One phrase for all that the value should be, one for each other cause."""
    start, wanted = "Input should be ", dict[str, None]()
    others = [f"{place}{cause}{value}" for cause in dict.fromkeys(causes) if not cause.startswith(start)]
    wanted.update((cause.removeprefix(start), None) for cause in causes if cause.startswith(start))
    return ([f"{place}{start}{' or '.join(wanted)}{value}"] if wanted else []) + others


def _explain_one(model: type[BaseModel], item: Mapping[str, Any], data: object) -> tuple[_Place, str, str]:
    """Place, cause and (where it tells something) the value."""
    kind, loc, context = item["type"], item["loc"], item.get("ctx", {})
    if kind in ("extra_forbidden", "missing"):
        place, key = _place(model, loc[:-1], data), str(loc[-1])
        return place, f"key {key!r} is missing" if kind == "missing" else f"unknown key {key!r}; {nearest(key, place.keys)}", ""
    place = _place(model, loc, data)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key, tags = context["discriminator"].strip("'"), _quoted(context.get("expected_tags", ""))
        if kind == "union_tag_not_found":
            return place, f"key {key!r} is missing", _shown(item["input"])
        return _Place(place.child(key), []), f"unknown {context['tag']!r}; {nearest(context['tag'], tags)}", ""
    if kind in ("literal_error", "enum") and isinstance(item["input"], str):
        return place, f"unknown {item['input']!r}; {nearest(item['input'], _quoted(context['expected']))}", ""
    message = item["msg"].removeprefix("Value error, ")
    for theirs, ours in _PHRASES:
        message = re.sub(theirs, ours, message)
    return place, message, _shown(item["input"])


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text) or [word.strip() for word in text.replace(" or ", ",").split(",") if word.strip()]


def _place(model: type[BaseModel], loc: Sequence[int | str], data: object) -> _Place:
    """The place that pydantic calls `loc`, without the tags and types of union members, which are no keys of the file."""
    models, node, parts = [model], data, list[str]()
    for part in loc:
        tagged = [m for m in models if part in _tags(m)] if len(models) > 1 else []
        if tagged:
            models = tagged
            continue
        fields = [m.model_fields[part] for m in models if isinstance(part, str) and part in m.model_fields]
        is_key = isinstance(node, Mapping) and part in node
        is_index = isinstance(part, int) and isinstance(node, Sequence) and not isinstance(node, str)
        if not (fields or is_key or is_index or isinstance(part, int)):
            continue
        inner = [m for field in fields for m in _models_in(field.annotation)]
        models = inner or models
        if isinstance(node, Mapping):
            node = node.get(part)
        elif isinstance(node, Sequence) and is_index and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            node = None
        name = node.get("name") if isinstance(part, int) and isinstance(node, Mapping) else None
        parts.append(f"{part} ({name})" if isinstance(name, str) else str(part))
    return _Place(".".join(parts), sorted({key for m in models for key in m.model_fields}))


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
