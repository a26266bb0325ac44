"""What a spec meets in a log, counted over batches."""

from typing import Any

import pyarrow as pa
import pytest

from ninerank.errors import DataError
from ninerank.features.profile import Profile
from ninerank.features.spec import MISSING_ID, FeatureSpec

KNOWN: dict[str, Any] = {"kind": "vocabulary", "values": ["a", "b"]}
SPEC = FeatureSpec.parse(
    {
        "labels": ["click", "buy"],
        "features": [
            {"kind": "id", "name": "user", "role": "user", "encoding": {"kind": "hashed", "num_buckets": 5}},
            {"kind": "id", "name": "item", "role": "item", "encoding": KNOWN},
            {"kind": "id", "name": "tags", "role": "item", "multi": True, "encoding": KNOWN},
            {"kind": "numeric", "name": "price", "role": "item"},
        ],
    },
    "spec",
)
ROWS = pa.record_batch(
    {
        "click": [1, 0, 1, 1],
        "buy": [0.0, 0.0, 1.0, 0.0],
        "user": ["x", "", None, "y"],
        "item": ["a", "c", "b", None],
        "tags": [["a", "z"], None, [], ["b", None]],
        "price": pa.array([None, -2.0, 4.0, None]),
    }
)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_counts_do_not_depend_on_batches(size: int) -> None:
    profile = Profile(SPEC)
    for at in range(0, 4, size):
        profile.update(ROWS.slice(at, size))
    found = profile.as_dict()
    assert found["num_rows"] == 4
    assert found["positive_rate"] == {"click": 0.75, "buy": 0.25}
    features = found["features"]
    assert {name: own["missing_share"] for name, own in features.items()} == {"user": 0.5, "item": 0.25, "tags": 0.5, "price": 0.5}
    assert features["user"]["unknown_share"] is None
    assert features["item"]["unknown_share"] == features["tags"]["unknown_share"] == pytest.approx(1 / 3)
    assert (features["price"]["min"], features["price"]["max"]) == (-2.0, 4.0)
    assert features["tags"]["mean_length"] == 0.75


def test_a_dynamic_feature_knows_all_ids_but_the_one_that_says_missing() -> None:
    encoding = {"kind": "dynamic"}
    features = [
        {"kind": "id", "name": "a", "role": "user", "dtype": "int64", "encoding": encoding},
        {"kind": "id", "name": "b", "role": "user", "encoding": encoding},
    ]
    profile = Profile(FeatureSpec.parse({"labels": ["click"], "features": features}, "spec"))
    profile.update(pa.record_batch({"click": [1, 0, 1, 0], "a": [1, None, MISSING_ID, -1], "b": ["x", "", None, "y"]}))
    for own in profile.as_dict()["features"].values():
        assert (own["missing_share"], own["unknown_share"]) == (0.5, None)


def test_no_rows_make_a_profile_without_ranges() -> None:
    found = Profile(SPEC).as_dict()
    assert found["num_rows"] == 0
    assert "min" not in found["features"]["price"]


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match="column 'price' is missing"):
        Profile(SPEC).update(ROWS.drop_columns(["price"]))
