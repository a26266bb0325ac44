"""The feature spec: which columns of a log become which ids, numbers and sequences, and what fitting learned about them.

`encoding` states what becomes of a column's values; this module states the columns, the tables they look into, and the file of it all.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, StrictInt, StrictStr, model_validator
from typing_extensions import Self

from ninerank.config import Config
from ninerank.errors import SpecError, nearest
from ninerank.features.encoding import (
    INT64_MAX,
    INT64_MIN,
    MISSING_ID,
    Bucketize,
    Dynamic,
    Hashed,
    Log,
    Numbered,
    Raw,
    Standardise,
    Vocabulary,
)
from ninerank.files import replacing

__all__ = [
    "MISSING_ID",
    "Bucketize",
    "Dynamic",
    "Feature",
    "FeatureSpec",
    "Hashed",
    "IdFeature",
    "Log",
    "Numbered",
    "NumericFeature",
    "Raw",
    "SequenceFeature",
    "Side",
    "Standardise",
    "TableSpec",
    "Vocabulary",
]

Role = Literal["user", "item", "context"]
Side = Literal["request", "item"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
Separator = Annotated[str, Field(min_length=1, max_length=8)]


class _Column(Config):
    name: Name
    role: Role
    column: str = Field(default="", description="column of the log; default: the feature's name")

    @model_validator(mode="before")
    @classmethod
    def _default_column(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("column") and isinstance(data.get("name"), str):
            return {**data, "column": data["name"]}
        return data

    @property
    def side(self) -> Side:
        """Side of the batch: user and context features belong to the request, item features to the candidate."""
        return "item" if self.role == "item" else "request"


class IdFeature(_Column):
    """One id a row, or with `multi` a bag of ids (the first `max_length` of them) pooled by sum or mean.

    A missing id, null or empty string, is read as `default` if given and takes row 0 otherwise; a missing bag is empty. Of a dynamic
    feature a missing id is `MISSING_ID`, and a bag leaves it out.
    """

    kind: Literal["id"] = "id"
    dtype: Literal["string", "int64"] = "string"
    encoding: Annotated[Vocabulary | Hashed | Numbered | Dynamic, Field(discriminator="kind")] = Vocabulary()
    multi: bool = False
    max_length: int | None = Field(default=None, ge=1)
    pooling: Literal["sum", "mean"] = "mean"
    separator: Separator = Field(default="|", description="between the ids of a multi feature, where a file holds them as one string")
    table: Name | None = Field(default=None, description="features of one table share rows; default: the feature's name")
    default: StrictInt | StrictStr | None = None

    @model_validator(mode="after")
    def _types(self) -> Self:
        if self.max_length is not None and not self.multi:
            raise ValueError("max_length is for multi features; set multi: true or leave it out")
        values = self.encoding.values or () if isinstance(self.encoding, Vocabulary) else ()
        known = values if self.default is None else (*values, self.default)
        wanted = str if self.dtype == "string" else int
        for value in known:
            if type(value) is not wanted:
                raise ValueError(f"{value!r} is not a {self.dtype} id, as dtype says it is")
            if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
                raise ValueError(f"{value} does not fit in int64")
        if isinstance(self.encoding, Numbered):
            if self.dtype != "int64":
                raise ValueError("encoding numbered takes the ids as row numbers; set dtype: int64")
            if isinstance(self.default, int) and not 0 <= self.default < self.encoding.num_ids:
                raise ValueError(f"default {self.default} is not among the ids 0 to {self.encoding.num_ids - 1} of encoding numbered")
        if isinstance(self.encoding, Dynamic) and self.dtype == "int64":
            if self.encoding.seed:
                raise ValueError(f"seed {self.encoding.seed} is for the hash of strings; a dynamic int64 id stays as it is")
            if self.default == MISSING_ID:
                raise ValueError(f"default {MISSING_ID} stands for missing in a dynamic feature; any other int64 is allowed")
        return self

    @property
    def table_name(self) -> str:
        return self.table or self.name

    @property
    def is_dynamic(self) -> bool:
        """Whether ids stay raw, for a table whose rows come and go."""
        return isinstance(self.encoding, Dynamic)

    @property
    def is_fitted(self) -> bool:
        return not isinstance(self.encoding, Vocabulary) or self.encoding.values is not None

    @property
    def num_rows(self) -> int:
        """Rows of the table, row 0 included, and 0 for a dynamic one; raises SpecError before fitting."""
        if isinstance(self.encoding, Dynamic):
            return 0
        if isinstance(self.encoding, Hashed):
            return 1 + self.encoding.num_buckets
        if isinstance(self.encoding, Numbered):
            return 1 + self.encoding.num_ids
        if self.encoding.values is None:
            raise SpecError(f"feature {self.name!r}: its vocabulary is not fitted; run `ninerank features fit` or fit() first")
        return 1 + len(self.encoding.values)


class NumericFeature(_Column):
    """One number a row, finite.

    A missing number is read as `default`; without one it becomes 0 after the transform (the mean, if standardised), or row 0 if bucketised.
    """

    kind: Literal["numeric"] = "numeric"
    transform: Annotated[Raw | Log | Standardise | Bucketize, Field(discriminator="kind")] = Raw()
    default: float | None = Field(default=None, allow_inf_nan=False)

    @property
    def table_name(self) -> str:
        return self.name

    @property
    def is_fitted(self) -> bool:
        if isinstance(self.transform, Standardise):
            return self.transform.mean is not None
        return not isinstance(self.transform, Bucketize) or self.transform.boundaries is not None

    @property
    def num_rows(self) -> int:
        """Rows of a bucketised number's table, row 0 included; raises SpecError before fitting and for dense numbers."""
        if not isinstance(self.transform, Bucketize):
            raise SpecError(f"feature {self.name!r}: a {self.transform.kind} number is dense and has no table")
        if self.transform.boundaries is None:
            raise SpecError(f"feature {self.name!r}: its boundaries are not fitted; run `ninerank features fit` or fit() first")
        return 2 + len(self.transform.boundaries)


class SequenceFeature(_Column):
    """Ordered ids, most recent last, that share the table and encoding of id feature `of`; the last `max_length` are kept."""

    kind: Literal["sequence"] = "sequence"
    of: Name
    max_length: int = Field(default=50, ge=1, le=100_000)
    separator: Separator = Field(default="|", description="between the ids, where a file holds them as one string")


Feature = Annotated[IdFeature | NumericFeature | SequenceFeature, Field(discriminator="kind")]


@dataclass(frozen=True)
class TableSpec:
    """A logical embedding table: num_rows counts row 0; features that look into it in spec order.

    A dynamic table takes raw 64-bit ids (`MISSING_ID` where there is none) and has no rows of its own: num_rows is 0.
    """

    name: str
    num_rows: int
    features: tuple[str, ...]
    is_dynamic: bool = False


class FeatureSpec(Config):
    """Labels and features of a log, with what fitting learned.

    >>> spec = FeatureSpec(labels=("click",), features=(IdFeature(name="user", role="user", encoding=Hashed(num_buckets=10)),))
    >>> spec.single_keys("request"), spec.tables["user"].num_rows, spec.is_fitted
    (('user',), 11, True)
    """

    labels: tuple[str, ...] = Field(min_length=1, description="label columns, each 0 or 1: one a task")
    weight: str | None = Field(default=None, description="column of row weights, finite and >= 0")
    group: str | None = Field(default=None, description="column whose values are the groups of GAUC")
    features: tuple[Feature, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [feature.name for feature in self.features]
        for kind, keys in (("feature name", names), ("label", self.labels)):
            for key in keys:
                if list(keys).count(key) > 1:
                    raise ValueError(f"{kind} {key!r} is used twice")
        answers = {*self.labels, self.weight}
        tables: dict[str, IdFeature | NumericFeature] = {}
        for feature in self.features:
            if feature.column in answers:
                raise ValueError(f"feature {feature.name!r} reads column {feature.column!r}, which is a label or the weight")
            if isinstance(feature, SequenceFeature):
                source = next((f for f in self.features if f.name == feature.of), None)
                if not isinstance(source, IdFeature):
                    ids = [f.name for f in self.features if isinstance(f, IdFeature)]
                    raise ValueError(f"feature {feature.name!r}: 'of: {feature.of}' is no id feature; {nearest(feature.of, ids)}")
            elif _form(feature) != "dense":
                first = tables.setdefault(feature.table_name, feature)
                if first is not feature and not _same_rows(first, feature):
                    both = f"features {first.name!r} and {feature.name!r}"
                    raise ValueError(f"{both} share table {feature.table_name!r} but not dtype and encoding")
        return self

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Self:
        """A new, validated spec with `update` applied; nothing computed from the old one is kept."""
        return type(self).model_validate({**{key: getattr(self, key) for key in type(self).model_fields}, **(update or {})})

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON, fitted state included."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @property
    def is_fitted(self) -> bool:
        return all(isinstance(feature, SequenceFeature) or feature.is_fitted for feature in self.features)

    @cached_property
    def tables(self) -> dict[str, TableSpec]:
        """Logical tables by name, in spec order; raises SpecError before fitting."""
        members: dict[str, list[str]] = {}
        rows: dict[str, int] = {}
        dynamic: set[str] = set()
        for feature in self.features:
            if not isinstance(feature, SequenceFeature) and _form(feature) != "dense":
                rows[feature.table_name] = feature.num_rows
                if isinstance(feature, IdFeature) and feature.is_dynamic:
                    dynamic.add(feature.table_name)
        for feature in self.features:
            table = self.table_of(feature.name)
            if table is not None:
                members.setdefault(table, []).append(feature.name)
        return {name: TableSpec(name, rows[name], tuple(features), name in dynamic) for name, features in members.items()}

    def table_of(self, name: str) -> str | None:
        """Name of the table that feature `name` looks into; None for a dense number."""
        feature = self.feature(name)
        if isinstance(feature, SequenceFeature):
            return self.source_of(feature).table_name
        return None if _form(feature) == "dense" else feature.table_name

    def feature(self, name: str) -> IdFeature | NumericFeature | SequenceFeature:
        """The feature of that name; raises SpecError that names the nearest."""
        for feature in self.features:
            if feature.name == name:
                return feature
        raise SpecError(f"unknown feature {name!r}; {nearest(name, [f.name for f in self.features])}")

    def source_of(self, feature: SequenceFeature) -> IdFeature:
        """The id feature whose table and encoding a sequence shares."""
        source = self.feature(feature.of)
        assert isinstance(source, IdFeature)
        return source

    def side(self, feature: str | IdFeature | NumericFeature | SequenceFeature) -> Side:
        """`request` for roles user and context, `item` for role item."""
        return (self.feature(feature) if isinstance(feature, str) else feature).side

    def single_keys(self, side: Side) -> tuple[str, ...]:
        """Features with exactly one id a row, bucketised numbers among them."""
        return tuple(f.name for f in self.features if f.side == side and _form(f) == "single")

    def bag_keys(self, side: Side) -> tuple[str, ...]:
        """Multi-valued id features."""
        return tuple(f.name for f in self.features if f.side == side and _form(f) == "bag")

    def sequence_keys(self, side: Side) -> tuple[str, ...]:
        """Sequence features."""
        return tuple(f.name for f in self.features if f.side == side and _form(f) == "sequence")

    def dense_keys(self, side: Side) -> tuple[str, ...]:
        """Numbers that stay numbers: the columns of `dense_RF`."""
        return tuple(f.name for f in self.features if f.side == side and _form(f) == "dense")

    def columns(self, side: Side | None = None) -> tuple[str, ...]:
        """Log columns that the features (of one side) read, each once, in spec order; labels, weight and group not among them."""
        return tuple(dict.fromkeys(f.column for f in self.features if side is None or f.side == side))

    @staticmethod
    def check_suffix(path: Path) -> None:
        """Raise SpecError unless `path` ends as a spec's file does."""
        if path.suffix not in {".json", ".yaml", ".yml"}:
            raise SpecError(f"{path}: a spec is saved as .json, .yaml or .yml, not {path.suffix!r}")

    def save(self, path: str | Path) -> None:
        """Write JSON (`.json`) or YAML (`.yaml`, `.yml`), and make its directory; keys at their default are left out of YAML."""
        file = Path(path)
        self.check_suffix(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
            if file.suffix == ".json":
                json.dump(self.model_dump(mode="json"), stream, ensure_ascii=False, allow_nan=False)
            else:
                dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
                yaml.dump(_tidy(self), stream, Dumper=dumper, sort_keys=False, allow_unicode=True, width=140)


def _form(feature: IdFeature | NumericFeature | SequenceFeature) -> Literal["single", "bag", "sequence", "dense"]:
    """Part of a block that a feature goes to."""
    if isinstance(feature, SequenceFeature):
        return "sequence"
    if isinstance(feature, IdFeature):
        return "bag" if feature.multi else "single"
    return "single" if isinstance(feature.transform, Bucketize) else "dense"


def _same_rows(a: IdFeature | NumericFeature, b: IdFeature | NumericFeature) -> bool:
    return isinstance(a, IdFeature) and isinstance(b, IdFeature) and a.dtype == b.dtype and a.encoding == b.encoding


def _tidy(model: BaseModel) -> dict[str, Any]:
    """Plain mapping without keys that say what the default says anyway."""
    kept = {}
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if key in {"kind", "name"} or not (value == field.default or (key == "column" and value == getattr(model, "name", None))):
            kept[key] = _plain(value)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _tidy(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
