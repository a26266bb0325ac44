"""Ids that are row numbers already: taken as they are, and what the table says becomes of any other."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError, SpecError
from ninerank.features.columns import arrow_schema
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
IDS = st.one_of(st.none(), st.integers(-3, 12), INT64)


def spec_of(out_of_range: str, default: int | None = None) -> FeatureSpec:
    encoding = {"kind": "numbered", "num_ids": 10, "out_of_range": out_of_range}
    one: dict[str, Any] = {"kind": "id", "role": "user", "dtype": "int64", "encoding": encoding, "table": "item"}
    features = [
        {**one, "name": "last", "default": default},
        {**one, "name": "liked", "multi": True, "max_length": 3},
        {"name": "seen", "kind": "sequence", "role": "user", "of": "last", "max_length": 3},
    ]
    return FeatureSpec.model_validate({"labels": ["y"], "features": features})


def row_of(id_: int | None, out_of_range: str, missing: int) -> int:
    if id_ is None:
        return missing
    if 0 <= id_ < 10:
        return 1 + id_
    return missing if out_of_range == "default" else 1 if id_ < 0 else 10


@given(st.lists(IDS, max_size=8), st.lists(st.lists(IDS, max_size=5), max_size=8), st.sampled_from(["clamp", "default"]), st.booleans())
def test_ids_out_of_range_take_the_row_that_the_table_says(
    singles: list[int | None], lists: list[list[int | None]], out_of_range: str, has_default: bool
) -> None:
    count = min(len(singles), len(lists))
    singles, lists = singles[:count], lists[:count]
    spec = spec_of(out_of_range, default=4 if has_default else None)
    rows = pa.record_batch({"last": singles, "liked": lists, "seen": lists}, schema=arrow_schema(spec, labels=False))
    block = Transform(spec).batch(rows).request
    assert spec.tables["item"].num_rows == 11
    assert block.single.values.tolist() == [row_of(id_, out_of_range, 5 if has_default else 0) for id_ in singles]
    assert block.bags.values.tolist() == [row_of(id_, out_of_range, 0) for ids in lists for id_ in ids[:3]]
    assert block.sequences.values.tolist() == [row_of(id_, out_of_range, 0) for ids in lists for id_ in ids[-3:]]


@pytest.mark.parametrize("column", ["last", "liked", "seen"])
@pytest.mark.parametrize("bad", [-1, 10, 1 << 62])
def test_an_id_out_of_range_is_refused_by_name(column: str, bad: int) -> None:
    spec = spec_of("error")
    good: dict[str, list[Any]] = {"last": [0, None, 9], "liked": [[1, 2], None, []], "seen": [[], [9], [0, 1]]}
    schema = arrow_schema(spec, labels=False)
    values = Transform(spec).batch(pa.record_batch(good, schema=schema)).request.single.values
    assert values.tolist() == [1, 0, 10]
    wrong = good | {column: [*good[column][:2], bad if column == "last" else [3, bad]]}
    allowed = "allowed: 0 to 9, or out_of_range: clamp or default in its encoding"
    with pytest.raises(DataError, match=rf"column '{column}', row 2: id {bad} is outside table 'item' of 10 ids; {allowed}"):
        Transform(spec).batch(pa.record_batch(wrong, schema=schema))


def test_request_rows_are_treated_alike() -> None:
    spec = spec_of("clamp")
    schema = arrow_schema(spec, labels=False)
    user = pa.record_batch({"last": [99], "liked": [[-7, 3]], "seen": [[10]]}, schema=schema)
    batch = Transform(spec).request(user, pa.record_batch({"n": np.zeros(2)}))
    assert [part.values.tolist() for part in (batch.request.single, batch.request.bags, batch.request.sequences)] == [[10], [1, 4], [10]]


def test_the_rule_is_part_of_the_spec() -> None:
    spec = spec_of("clamp")
    assert FeatureSpec.model_validate_json(spec.canonical_json()) == spec
    assert len({spec_of(rule).digest for rule in ("error", "clamp", "default")}) == 3
    assert spec.is_fitted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "string"}, "set dtype: int64"),
        ({"default": 10}, "default 10 is not among the ids 0 to 9"),
        ({"encoding": {"kind": "numbered", "num_ids": 0}}, "greater than or equal to 1"),
        ({"encoding": {"kind": "numbered", "num_ids": 10, "out_of_range": "drop"}}, "unknown 'drop'; valid: clamp, default, error"),
        ({"encoding": {"kind": "numbered", "num_ids": 10, "out_of_rang": "clamp"}}, "out_of_range"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    feature = {"name": "a", "kind": "id", "role": "user", "dtype": "int64", "encoding": {"kind": "numbered", "num_ids": 10}}
    with pytest.raises(SpecError, match=message):
        FeatureSpec.parse({"labels": ["y"], "features": [feature | change]}, "spec")


def test_features_of_one_table_have_one_rule() -> None:
    features = [
        {
            "name": name,
            "kind": "id",
            "role": "user",
            "dtype": "int64",
            "table": "t",
            "encoding": {"kind": "numbered", "num_ids": 10, **rule},
        }
        for name, rule in (("a", {}), ("b", {"out_of_range": "clamp"}))
    ]
    with pytest.raises(SpecError, match="features 'a' and 'b' share table 't' but not dtype and encoding"):
        FeatureSpec.parse({"labels": ["y"], "features": features}, "spec")
