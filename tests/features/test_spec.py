"""The spec as a file, its tables, and its digest."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ninerank.errors import SpecError
from ninerank.features.spec import MISSING_ID, FeatureSpec, IdFeature, SequenceFeature, TableSpec

DOCUMENT: dict[str, Any] = {
    "labels": ["click", "buy"],
    "weight": "weight",
    "group": "session",
    "features": [
        {"kind": "id", "name": "user", "role": "user", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 99, "seed": 7}},
        {"kind": "numeric", "name": "age", "role": "user", "transform": {"kind": "standardise", "mean": 30.5, "std": 0.1}},
        {"kind": "numeric", "name": "spend", "role": "context", "transform": {"kind": "log"}, "default": 1.5},
        {"kind": "sequence", "name": "seen", "role": "user", "of": "item", "max_length": 4},
        {"kind": "id", "name": "item", "role": "item", "table": "goods", "encoding": {"kind": "vocabulary", "values": ["é", "b", "1"]}},
        {
            "kind": "id",
            "name": "related",
            "role": "item",
            "table": "goods",
            "multi": True,
            "max_length": 3,
            "pooling": "sum",
            "default": "b",
            "encoding": {"kind": "vocabulary", "values": ["é", "b", "1"]},
        },
        {
            "kind": "numeric",
            "name": "price",
            "role": "item",
            "column": "cents",
            "transform": {"kind": "bucketize", "boundaries": [1.0, 2.5]},
        },
        {"kind": "numeric", "name": "rank", "role": "item"},
    ],
}


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """DOCUMENT with the value at `path` set."""
    document = json.loads(json.dumps(DOCUMENT))
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return document  # type: ignore[no-any-return]


def small(**feature: Any) -> FeatureSpec:
    return FeatureSpec.parse({"labels": ["click"], "features": [{"kind": "id", "name": "user", "role": "user", **feature}]}, "spec")


@pytest.fixture(scope="module")
def spec() -> FeatureSpec:
    return FeatureSpec.parse(DOCUMENT, "spec")


def test_json_may_escape_a_character_as_a_surrogate_pair(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"labels": ["\U0001f600"], "features": DOCUMENT["features"][:1]}))
    assert FeatureSpec.load(tmp_path / "a.json").labels == ("\U0001f600",)


@pytest.mark.parametrize("name", ["spec.yaml", "spec.yml", "spec.json"])
def test_a_file_keeps_spec_and_digest(spec: FeatureSpec, name: str, tmp_path: Path) -> None:
    spec.save(tmp_path / name)
    again = FeatureSpec.load(tmp_path / name)
    assert again == spec
    assert again.digest == spec.digest
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_values_that_yaml_could_take_for_others_come_back_as_strings(tmp_path: Path) -> None:
    values = ["1", "01", "1e3", "no", "null", "2024-01-01", "~", " x", "a: b", "\u2028", "\U0001f600", "-", "0x1F", "\x7f"]
    spec = small(encoding={"kind": "vocabulary", "values": values})
    for name in ("spec.yaml", "spec.json"):
        spec.save(tmp_path / name)
        assert FeatureSpec.load(tmp_path / name).digest == spec.digest


def test_yaml_leaves_out_what_the_defaults_say(tmp_path: Path) -> None:
    small().save(tmp_path / "spec.yaml")
    document = yaml.safe_load((tmp_path / "spec.yaml").read_text())
    assert document == {"labels": ["click"], "features": [{"name": "user", "role": "user", "kind": "id"}]}


def test_another_ending_is_refused(spec: FeatureSpec, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="spec.txt: a spec is saved as .json, .yaml or .yml"):
        spec.save(tmp_path / "spec.txt")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("labels",), ["click"]),
        (("weight",), None),
        (("group",), "user"),
        (("features", 0, "encoding", "seed"), 8),
        (("features", 0, "role"), "context"),
        (("features", 1, "transform", "mean"), 30.500000000000004),
        (("features", 1, "transform", "std"), 0.2),
        (("features", 2, "default"), None),
        (("features", 3, "max_length"), 5),
        (("features", 6, "transform", "boundaries"), [1.0, 2.6]),
        (("features", 7, "column"), "position"),
    ],
)
def test_the_digest_covers_settings_and_fitted_state(spec: FeatureSpec, path: tuple[str | int, ...], value: Any) -> None:
    assert FeatureSpec.parse(changed(path, value), "spec").digest != spec.digest


def test_the_digest_covers_the_order_of_a_vocabulary() -> None:
    one, other = (small(encoding={"kind": "vocabulary", "values": values}) for values in (["a", "b"], ["b", "a"]))
    assert one.digest != other.digest


def test_the_digest_is_that_of_the_spec_not_of_its_spelling() -> None:
    plain = small()
    assert plain.digest == small(column="user", dtype="string", encoding={"kind": "vocabulary"}, multi=False).digest
    assert re.fullmatch("[0-9a-f]{64}", plain.digest)


def test_a_copy_has_a_digest_and_tables_of_its_own(spec: FeatureSpec) -> None:
    assert spec.tables
    copy = spec.model_copy(update={"features": spec.features[:1], "labels": ("click",)})
    assert copy.digest != spec.digest
    assert list(copy.tables) == ["user"]


def test_keys_by_side_in_spec_order(spec: FeatureSpec) -> None:
    assert spec.single_keys("request") == ("user",)
    assert spec.dense_keys("request") == ("age", "spend")
    assert spec.sequence_keys("request") == ("seen",)
    assert spec.single_keys("item") == ("item", "price")
    assert spec.bag_keys("item") == ("related",)
    assert spec.dense_keys("item") == ("rank",)
    assert spec.bag_keys("request") == spec.sequence_keys("item") == ()
    assert spec.columns("item") == ("item", "related", "cents", "rank")
    assert [spec.side(name) for name in ("user", "spend", "price")] == ["request", "request", "item"]


def test_tables_are_shared_and_count_row_zero(spec: FeatureSpec) -> None:
    assert spec.tables == {
        "user": TableSpec("user", 100, ("user",)),
        "goods": TableSpec("goods", 4, ("seen", "item", "related")),
        "price": TableSpec("price", 4, ("price",)),
    }
    assert spec.table_of("seen") == "goods"
    assert spec.table_of("rank") is None


def test_a_sequence_takes_table_and_encoding_of_its_id_feature(spec: FeatureSpec) -> None:
    seen = spec.feature("seen")
    assert isinstance(seen, SequenceFeature)
    assert spec.source_of(seen) is spec.feature("item")


def test_row_counts() -> None:
    assert small(encoding={"kind": "hashed", "num_buckets": 5}).tables["user"].num_rows == 6
    assert small(encoding={"kind": "vocabulary", "values": []}).tables["user"].num_rows == 1
    assert small(kind="numeric", transform={"kind": "bucketize", "boundaries": []}).tables["user"].num_rows == 2


def test_a_dynamic_table_has_no_rows_and_is_fitted() -> None:
    own = {"role": "item", "encoding": {"kind": "dynamic", "seed": 5}}
    features = [
        {"kind": "id", "name": "item", **own},
        {"kind": "id", "name": "related", "table": "item", "multi": True, **own},
        {"kind": "sequence", "name": "seen", "role": "user", "of": "item"},
        {"kind": "id", "name": "shop", "role": "item", "encoding": {"kind": "hashed", "num_buckets": 3}},
    ]
    spec = FeatureSpec.parse({"labels": ["click"], "features": features}, "spec")
    assert spec.is_fitted
    assert spec.tables == {
        "item": TableSpec("item", 0, ("item", "related", "seen"), is_dynamic=True),
        "shop": TableSpec("shop", 4, ("shop",), is_dynamic=False),
    }
    assert FeatureSpec.parse(json.loads(spec.canonical_json()), "again") == spec


def test_a_dynamic_feature_shares_rows_with_its_like_alone() -> None:
    own = {"kind": "id", "role": "item", "table": "ids", "encoding": {"kind": "dynamic"}}
    for other in ({"dtype": "int64"}, {"encoding": {"kind": "dynamic", "seed": 1}}, {"encoding": {"kind": "hashed", "num_buckets": 9}}):
        with pytest.raises(SpecError, match="share table 'ids' but not dtype and encoding"):
            FeatureSpec.parse({"labels": ["click"], "features": [{**own, "name": "a"}, {**own, "name": "b", **other}]}, "spec")


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"dtype": "int64", "encoding": {"kind": "dynamic", "seed": 1}}, "seed 1 is for the hash of strings"),
        ({"dtype": "int64", "encoding": {"kind": "dynamic"}, "default": MISSING_ID}, "-9223372036854775808 stands for missing"),
        ({"encoding": {"kind": "dynamic"}, "default": 5}, "5 is not a string id"),
        ({"encoding": {"kind": "dynamic", "num_buckets": 5}}, "unknown key 'num_buckets'"),
        ({"encoding": {"kind": "dynamic", "seed": -1}}, "seed"),
    ],
)
def test_a_wrong_dynamic_feature_is_refused(feature: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        small(**feature)


def test_tables_need_a_fitted_spec() -> None:
    spec = small()
    assert not spec.is_fitted
    with pytest.raises(SpecError, match="feature 'user': its vocabulary is not fitted"):
        _ = spec.tables
    with pytest.raises(SpecError, match="its boundaries are not fitted"):
        _ = small(kind="numeric", transform={"kind": "bucketize"}).tables


def test_an_unknown_feature_is_refused_with_the_nearest(spec: FeatureSpec) -> None:
    with pytest.raises(SpecError, match="unknown feature 'prices'; did you mean 'price'"):
        spec.feature("prices")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("wieght",), "w", "unknown key 'wieght'; did you mean 'weight'"),
        (("features", 0, "dtpye"), "int64", "unknown key 'dtpye'; did you mean 'dtype'"),
        (("features", 0, "encoding", "num_bucket"), 3, "unknown key 'num_bucket'; did you mean 'num_buckets'"),
        (("features", 3, "max_len"), 3, "unknown key 'max_len'; did you mean 'max_length'"),
        (("features", 0, "kind"), "ident", "ident"),
        (("features", 0, "encoding", "num_buckets"), 0, "num_buckets"),
        (("features", 0, "default"), "x", "'x' is not a int64 id"),
        (("features", 0, "default"), 1 << 63, "does not fit in int64"),
        (("features", 1, "transform", "std"), 0.0, "std"),
        (("features", 1, "transform", "std"), None, "mean and std are given together"),
        (("features", 3, "of"), "itme", "did you mean 'item'"),
        (("features", 3, "of"), "price", "is no id feature"),
        (("features", 4, "name"), "user", "feature name 'user' is used twice"),
        (("features", 4, "name"), "a b", "name"),
        (("features", 4, "max_length"), 3, "max_length is for multi features"),
        (("features", 4, "encoding", "values"), ["a", "a"], "an id twice"),
        (("features", 4, "encoding", "values"), ["a", ""], "empty string"),
        (("features", 4, "encoding", "values"), [1, 2], "1 is not a string id"),
        (("features", 5, "encoding", "values"), ["other"], "share table 'goods' but not dtype and encoding"),
        (("features", 6, "transform", "boundaries"), [2.0, 1.0], "increase strictly"),
        (("features", 6, "transform", "boundaries"), [1.0, float("inf")], "boundaries"),
        (("features", 6, "column"), "click", "reads column 'click', which is a label or the weight"),
        (("labels",), ["click", "click"], "label 'click' is used twice"),
        (("labels",), [], "labels"),
        (("features",), [], "features"),
    ],
)
def test_a_wrong_spec_is_refused(path: tuple[str | int, ...], value: Any, said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)) as error:
        FeatureSpec.parse(changed(path, value), "my.yaml")
    assert str(error.value).startswith("my.yaml")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "labels: [", "is not valid YAML"),
        ("a.json", "{", "is not valid JSON"),
        ("a.yaml", "- 1", "holds list at the top"),
        ("a.yaml", "", "holds NoneType at the top"),
        ("a.json", r'{"labels": ["\ud800"]}', "is not valid JSON"),
        ("a.yaml", r'labels: ["\ud800"]', "is not valid YAML"),
        ("a.yaml", "labels: [y]", "key 'features' is missing"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SpecError, match=re.escape(said)) as error:
        FeatureSpec.load(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        FeatureSpec.load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        FeatureSpec.load(tmp_path / "b.yaml")


def test_the_json_schema_names_all_kinds() -> None:
    schema = FeatureSpec.model_json_schema()
    assert set(schema["properties"]) == {"labels", "weight", "group", "features"}
    assert {IdFeature.__name__, SequenceFeature.__name__} <= set(schema["$defs"])
    assert schema["additionalProperties"] is False
