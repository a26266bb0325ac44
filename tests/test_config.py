"""What a wrong configuration is told: one line, the place as a person writes it, what is allowed."""

from pathlib import Path
from typing import Any

import pytest

from ninerank.config import read_mapping
from ninerank.errors import SpecError
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.requestfile import RequestFile
from ninerank.training.recipe import Recipe


def spec(**feature: Any) -> dict[str, Any]:
    return {"labels": ["click"], "features": [{"name": "user", "role": "user", "kind": "id", **feature}]}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.yaml", "data:\n  dir: log\n train: x\n", ":3:2: is not valid YAML: did not find expected key"),
        ("r.yaml", "a: 1\nb: [1, 2\n", ":3:1: is not valid YAML: did not find expected ',' or ']'"),
        ("r.yaml", "a:\n\tb: 1\n", ":2:1: is not valid YAML: a tab; indent with spaces"),
        ("r.yaml", "a: b: c\n", ":1:5: is not valid YAML: mapping values are not allowed in this context"),
        ("r.yaml", "a: *b\n", ":1:4: is not valid YAML: found undefined alias"),
        ("r.yaml", "a: \x07\n", ": is not valid YAML: "),
        ("r.yaml", "a: 2026-13-45\n", ": is not valid YAML: month must be in 1..12"),
        ("r.json", '{"a": 1,\n "b" 2}', ":2:6: is not valid JSON: Expecting ':' delimiter"),
    ],
)  # fmt: skip
def test_a_syntax_error_is_one_line_with_its_place(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SpecError) as error:
        read_mapping(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}{said}")
    assert "\n" not in str(error.value)


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [x]\r\n")
    (tmp_path / "r.json").write_bytes(b'\xef\xbb\xbf{"a": 1,\r\n"b": ["x"]}\r\n')
    assert read_mapping(tmp_path / "r.yaml") == read_mapping(tmp_path / "r.json") == {"a": 1, "b": ["x"]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            spec(encoding={"kind": "vocab"}),
            "features.0 (user).encoding.kind: unknown 'vocab'; did you mean 'vocabulary'? valid: dynamic, hashed, numbered, vocabulary",
        ),
        (spec(encoding={"kind": "hashed"}), "features.0 (user).encoding: key 'num_buckets' is missing"),
        (spec(encoding={}), "features.0 (user).encoding: key 'kind' is missing (value {})"),
        (
            spec(encoding={"kind": "hashed", "num_buckets": 0}),
            "features.0 (user).encoding.num_buckets: Input should be greater than or equal to 1 (value 0)",
        ),
        (spec(role="usr"), "features.0 (user).role: unknown 'usr'; did you mean 'user'? valid: context, item, user"),
        (spec(kind="idd"), "features.0 (user).kind: unknown 'idd'; did you mean 'id'? valid: id, numeric, sequence"),
        (spec(default=1.5), "features.0 (user).default: Input should be a valid integer or a valid string (value 1.5)"),
        (spec() | {"labels": "click"}, "labels: Input should be a list (value 'click')"),
        (spec() | {"features": []}, "features: List should have at least 1 item after validation, not 0 (value [])"),
        (spec() | {"features": [3]}, "features.0: Input should be a mapping (value 3)"),
        (3, "Input should be a mapping (value 3)"),
        ({}, "key 'labels' is missing; key 'features' is missing"),
    ],
)
def test_a_wrong_spec_is_told_by_its_own_keys(data: object, said: str) -> None:
    with pytest.raises(SpecError) as error:
        FeatureSpec.parse(data, "s.yaml")
    assert str(error.value) == f"s.yaml: {said}"


def test_an_unknown_key_that_is_named_as_a_kind_is_met_where_it_stands() -> None:
    with pytest.raises(SpecError, match=r"^s.yaml: features.0 \(user\): unknown key 'id'; did you mean 'kind'\?"):
        FeatureSpec.parse(spec(id=3), "s.yaml")


def test_a_wrong_recipe_is_told_by_its_own_keys() -> None:
    recipe = {
        "data": {"train": 3, "valid": "b"},
        "spec": spec(encoding={"kind": "vocab"}),
        "model": {"name": "deepfm", "mlp": {"hiden": 1}},
    }
    with pytest.raises(SpecError) as error:
        Recipe.parse(recipe, "r.yaml")
    assert str(error.value) == (
        "r.yaml: data.train: Input should be a valid string or a list (value 3); "
        "spec.features.0 (user).encoding.kind: unknown 'vocab'; did you mean 'vocabulary'? valid: dynamic, hashed, numbered, vocabulary; "
        "model.mlp: unknown key 'hiden'; did you mean 'hidden'? valid: activation, batch_norm, dropout, hidden"
    )


def test_members_of_a_plain_union_are_joined() -> None:
    with pytest.raises(SpecError, match=r"^r.json: items: Input should be a mapping or a list \(value 3\)$"):
        RequestFile.parse({"user": {}, "items": 3}, "r.json")


def test_many_errors_are_counted() -> None:
    with pytest.raises(SpecError, match=r"unknown key 'k4'.*; and 3 more$"):
        RequestFile.parse({"user": {}, **{f"k{i}": i for i in range(8)}}, "r.json")
