"""The transform gives each row the same bits whatever rows it comes with, and refuses what cannot be encoded.

Shape legend: R rows, F features.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError, SpecError
from ninerank.features.batch import Batch, Block
from ninerank.features.columns import arrow_schema
from ninerank.features.hashing import P1, P2, P3, P4, P5, hash_bytes, hash_strings
from ninerank.features.kernels import log1p
from ninerank.features.spec import MISSING_ID, FeatureSpec
from ninerank.features.transform import Transform

HASHED = {"kind": "hashed", "num_buckets": 1000, "seed": 3}
DYNAMIC = {"kind": "dynamic"}
INTS = {"kind": "vocabulary", "values": [7, -5, 0, 9_007_199_254_740_993]}
STRINGS = {"kind": "vocabulary", "values": ["é", "b", "7", "a long id of more than thirty-two bytes"]}
FEATURES: list[dict[str, Any]] = [
    {"kind": "id", "name": "user", "role": "user", "encoding": HASHED},
    {"kind": "id", "name": "plan", "role": "user", "dtype": "int64", "encoding": INTS, "default": -5},
    {"kind": "id", "name": "likes", "role": "user", "multi": True, "max_length": 3, "encoding": HASHED},
    {"kind": "sequence", "name": "seen", "role": "user", "of": "item", "max_length": 2},
    {"kind": "sequence", "name": "numbers", "role": "context", "of": "code"},
    {"kind": "id", "name": "friends", "role": "user", "multi": True, "max_length": 2, "encoding": {"kind": "dynamic", "seed": 3}},
    {"kind": "sequence", "name": "viewed", "role": "user", "of": "shop", "max_length": 3},
    {"kind": "numeric", "name": "age", "role": "user", "transform": {"kind": "standardise", "mean": 31.25, "std": 7.3}},
    {"kind": "numeric", "name": "spend", "role": "context", "transform": {"kind": "log"}, "default": 3.0},
    {"kind": "id", "name": "item", "role": "item", "encoding": STRINGS},
    {"kind": "id", "name": "code", "role": "item", "dtype": "int64", "encoding": HASHED},
    {"kind": "id", "name": "tags", "role": "item", "multi": True, "dtype": "int64", "encoding": INTS, "default": 7},
    {"kind": "id", "name": "shop", "role": "item", "dtype": "int64", "encoding": DYNAMIC},
    {"kind": "id", "name": "brand", "role": "item", "encoding": DYNAMIC, "default": "none"},
    {"kind": "id", "name": "offers", "role": "item", "multi": True, "dtype": "int64", "encoding": DYNAMIC, "max_length": 3},
    {"kind": "id", "name": "parts", "role": "item", "multi": True, "dtype": "int64", "encoding": DYNAMIC, "default": -3},
    {"kind": "numeric", "name": "price", "role": "item"},
    {
        "kind": "numeric",
        "name": "shelf",
        "role": "item",
        "column": "price",
        "transform": {"kind": "bucketize", "boundaries": [-1.0, 0.0, 9.5]},
    },
]
SPEC = FeatureSpec.parse({"labels": ["click"], "weight": "weight", "group": "session", "features": FEATURES}, "spec")
TRANSFORM = Transform(SPEC)

texts = st.one_of(st.none(), st.sampled_from(["", *STRINGS["values"]]), st.text(max_size=40))
integers = st.one_of(st.none(), st.sampled_from([*INTS["values"], MISSING_ID, 1 - (1 << 63), -1]), st.integers(-(1 << 63), (1 << 63) - 1))
floats = st.one_of(st.none(), st.sampled_from([0.0, -0.0, -1.0, 9.5, 5e-324, 1e-9]), st.floats(-1e37, 1e37))


def bags(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.lists(values, max_size=5))


STRATEGIES = {
    "user": texts,
    "plan": integers,
    "likes": bags(texts),
    "seen": bags(texts),
    "numbers": bags(integers),
    "friends": bags(texts),
    "viewed": bags(integers),
    "age": floats,
    "spend": floats,
    "item": texts,
    "code": integers,
    "tags": bags(integers),
    "shop": integers,
    "brand": texts,
    "offers": bags(integers),
    "parts": bags(integers),
    "price": floats,
}
rows_of_log = st.fixed_dictionaries(STRATEGIES)


def table(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=arrow_schema(SPEC))


def ids_of(block: Block) -> dict[str, list[list[int]]]:
    """Table rows of each feature, row by row."""
    found: dict[str, list[list[int]]] = {}
    for keyed in (block.single, block.bags, block.sequences):
        for key, jagged in keyed.items():
            bounds = jagged.offsets.tolist()
            found[key] = [jagged.values[a:b].tolist() for a, b in pairwise(bounds)]
    return found


def joined_ids(blocks: list[Block]) -> dict[str, list[list[int]]]:
    parts = [ids_of(block) for block in blocks]
    return {key: [row for part in parts for row in part[key]] for key in parts[0]}


def bits(dense_RF: torch.Tensor) -> list[list[int]]:
    return dense_RF.view(torch.int32).tolist()


def same(block: Block, parts: list[Block]) -> None:
    assert joined_ids(parts) == ids_of(block)
    assert bits(torch.cat([part.dense_RF for part in parts])) == bits(block.dense_RF)


@given(st.lists(rows_of_log, min_size=1, max_size=12), st.data())
def test_how_rows_are_split_changes_nothing(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    bounds = list(zip([0, *cuts], [*cuts, len(rows)], strict=True))
    whole = TRANSFORM.batch(table(rows))
    slices = [TRANSFORM.batch(table(rows).slice(a, b - a)) for a, b in bounds]
    rebuilt = [TRANSFORM.batch(table(rows[a:b])) for a, b in bounds]
    for parts in (slices, rebuilt):
        same(whole.request, [part.request for part in parts])
        same(whole.item, [part.item for part in parts])


@given(st.lists(rows_of_log, min_size=1, max_size=4), st.lists(rows_of_log, max_size=8), st.data())
def test_a_request_has_the_bits_of_its_joined_rows(users: list[dict[str, Any]], items: list[dict[str, Any]], data: st.DataObject) -> None:
    owner = np.array(data.draw(st.lists(st.integers(0, len(users) - 1), min_size=len(items), max_size=len(items))), np.int64)
    request, item = SPEC.columns("request"), SPEC.columns("item")
    joined = [{**{k: users[u][k] for k in request}, **{k: own[k] for k in item}} for u, own in zip(owner, items, strict=True)]
    apart = TRANSFORM.request(table(users).select(list(request)), table(items).select(list(item)), owner)
    together = TRANSFORM.batch(table(joined))
    assert apart.user_row_B is not None
    assert apart.user_row_B.tolist() == owner.tolist()
    same(together.item, [apart.item])
    expanded = {key: [values[u] for u in owner] for key, values in ids_of(apart.request).items()}
    assert expanded == ids_of(together.request)
    assert bits(apart.request.dense_RF[torch.from_numpy(owner)]) == bits(together.request.dense_RF)


def hashed(data: bytes) -> int:
    return 1 + hash_bytes(data, 3) % 1000


def of_text(value: str | None) -> int:
    return hashed(value.encode()) if value else 0


def of_int(value: int | None) -> int:
    return 0 if value is None else hashed(value.to_bytes(8, "little", signed=True))


def of_known(values: list[Any], missing: int = 0) -> Callable[[Any], int]:
    known = {value: row for row, value in enumerate(values, 1)}
    return lambda value: missing if value is None else known.get(value, 0)


def raw_text(value: str | None, seed: int = 0, missing: int = MISSING_ID) -> int:
    return int.from_bytes(hash_bytes(value.encode(), seed).to_bytes(8, "little"), "little", signed=True) if value else missing


def raw_int(value: int | None, missing: int = MISSING_ID) -> int:
    return missing if value is None or value == MISSING_ID else value


def present(ids: list[int], longest: int) -> list[int]:
    return [own for own in ids if own != MISSING_ID][:longest]


@given(rows_of_log)
def test_ids_agree_with_a_scalar_reference(row: dict[str, Any]) -> None:
    batch = TRANSFORM.batch(table([row]))
    item_row, plan_row, tag_row = of_known(STRINGS["values"]), of_known(INTS["values"], 2), of_known(INTS["values"], 1)  # type: ignore[arg-type]
    assert ids_of(batch.request) == {
        "user": [[of_text(row["user"])]],
        "plan": [[plan_row(row["plan"])]],
        "likes": [[of_text(value) for value in (row["likes"] or [])[:3]]],
        "seen": [[item_row(value) for value in (row["seen"] or [])[-2:]]],
        "numbers": [[of_int(value) for value in row["numbers"] or []]],
        "friends": [present([raw_text(value, 3) for value in row["friends"] or []], 2)],
        "viewed": [[raw_int(value) for value in (row["viewed"] or [])[-3:]]],
    }
    price = row["price"]
    assert ids_of(batch.item) == {
        "item": [[item_row(row["item"])]],
        "code": [[of_int(row["code"])]],
        "tags": [[tag_row(value) for value in row["tags"] or [7]]],
        "shop": [[raw_int(row["shop"])]],
        "brand": [[raw_text(row["brand"], missing=raw_text("none"))]],
        "offers": [present([raw_int(value) for value in row["offers"] or []], 3)],
        "parts": [[raw_int(value, -3) for value in row["parts"] or [-3]]],
        "shelf": [[0 if price is None else 1 + sum(boundary <= price for boundary in (-1.0, 0.0, 9.5))]],
    }


@given(rows_of_log)
def test_numbers_agree_with_a_scalar_reference(row: dict[str, Any]) -> None:
    batch = TRANSFORM.batch(table([row]))
    age, spend, price = row["age"], 3.0 if row["spend"] is None else row["spend"], row["price"]
    request_F = [0.0 if age is None else (age - 31.25) / 7.3, math.copysign(math.log1p(abs(spend)), spend)]
    assert bits(batch.item.dense_RF) == bits(torch.tensor([[0.0 if price is None else price]], dtype=torch.float32))
    np.testing.assert_array_max_ulp(batch.request.dense_RF.numpy(), np.array([request_F], np.float32), maxulp=1)


@given(st.floats(0, 1.7e308))
def test_log1p_is_within_two_ulp(x: float) -> None:
    np.testing.assert_array_max_ulp(np.float64(log1p(x)), np.float64(math.log1p(x)), maxulp=2)


def encoded(name: str, array: pa.Array) -> list[list[int]]:
    """Table rows of item feature `name` (or of a feature with a spec of its own) for `array`."""
    own = next(f for f in FEATURES if f["name"] == name)
    spec = FeatureSpec.parse({"labels": ["click"], "features": [own]}, "spec")
    batch = Transform(spec).batch(pa.record_batch({own.get("column", name): array}))
    return ids_of(batch.item if own["role"] == "item" else batch.request)[name]


INT_FORMS = [
    *(pa.array([7, 0, None, 100], held) for held in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64())),
    *(pa.array([7.0, 0.0, None, 100.0], held) for held in (pa.float32(), pa.float64())),
    *(pa.array(["7", "0", None, "100"], held) for held in (pa.string(), pa.large_string())),
    pa.array(["7", "0", "", "100"]),
    pa.array(["7", "0", None, "100"]).dictionary_encode(),
]


@pytest.mark.parametrize("array", INT_FORMS, ids=lambda array: str(array.type))
@pytest.mark.parametrize("name", ["plan", "code"])
def test_an_integer_id_is_one_id_however_it_is_held(name: str, array: pa.Array) -> None:
    assert encoded(name, array) == encoded(name, pa.array([7, 0, None, 100], pa.int64()))
    assert encoded(name, array)[2] == [2 if name == "plan" else 0]


@pytest.mark.parametrize(
    "array",
    [
        *(form for form in INT_FORMS if form.type != pa.string() or form[2].as_py() is None),
        pa.array(["7", "0", None, "100"], pa.string_view()),
    ],
    ids=lambda array: str(array.type),
)
@pytest.mark.parametrize("name", ["user", "item"])
def test_a_string_id_is_one_id_however_it_is_held(name: str, array: pa.Array) -> None:
    assert encoded(name, array) == encoded(name, pa.array(["7", "0", None, "100"], pa.string()))


@pytest.mark.parametrize(
    "held", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.string()), pa.list_(pa.float64(), 2)], ids=str
)
def test_lists_of_other_types_give_the_same_rows(held: pa.DataType) -> None:
    values = [["7", "0"], None, ["100", "7"]] if held == pa.list_(pa.string()) else [[7, 0], None, [100, 7]]
    assert encoded("tags", pa.array(values, held)) == [[1, 3], [1], [0, 1]]
    assert encoded("tags", pa.array([[7, 9], *values] if values[0] == [7, 0] else [["7", "9"], *values], held)[2:]) == [[1], [0, 1]]


def test_an_all_null_column_is_missing_everywhere() -> None:
    assert encoded("plan", pa.nulls(2)) == [[2], [2]]
    assert encoded("likes", pa.nulls(2)) == [[], []]


def test_what_lies_under_a_null_list_is_not_read() -> None:
    lists = pa.ListArray.from_arrays(
        pa.array([0, 1, 3, 4], pa.int32()), pa.array([7, 0, 0, 7], pa.int64()), mask=pa.array([False, True, False])
    )
    assert encoded("tags", lists) == [[1], [1], [1]]


GOOD: dict[str, list[Any]] = {
    "user": ["ann", "bob", None],
    "plan": [7, 0, 1],
    "likes": [["x"], None, []],
    "seen": [[], ["b"], ["é", "b"]],
    "numbers": [[1], [2], None],
    "age": [20.0, None, 30.0],
    "spend": [1.0, 2.0, 3.0],
    "item": ["b", "é", "7"],
    "code": [1, 2, 3],
    "tags": [[7], [], None],
    "friends": [["bob"], [], None],
    "viewed": [[5], None, [6, 7]],
    "shop": [5, None, -6],
    "brand": ["b", None, "c"],
    "offers": [[1 << 62], [], None],
    "parts": [[1], [], None],
    "price": [1.0, 2.0, None],
    "click": [0.0, 1.0, 1.0],
    "weight": [1.0, 0.0, 2.5],
    "session": ["s", "s", "t"],
}


def with_column(name: str, values: Any) -> pa.RecordBatch:
    return pa.record_batch({**{key: pa.array(value) for key, value in GOOD.items()}, name: pa.array(values)})


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("age", [1.0, float("nan"), 2.0], "column 'age', row 1: nan is refused"),
        ("spend", [1.0, 2.0, float("inf")], "column 'spend', row 2: inf is refused"),
        ("price", [float("-inf"), 2.0, 1.0], "column 'price', row 0: -inf is refused"),
        ("price", [1.0, 1e39, 1.0], "column 'price', row 1: 1e\\+39 is refused"),
        ("price", ["1", "2", "3"], "column 'price' is of type string; a number takes"),
        ("plan", [1.0, 2.5, 3.0], "column 'plan', row 1: 2.5 cannot be an id"),
        ("plan", [1.0, 2.0, float("nan")], "column 'plan', row 2: nan cannot be an id"),
        ("plan", [1.0, 2.0, 1e17], "column 'plan', row 2: 1e\\+17 cannot be an id"),
        ("plan", ["1", "x", "2"], "column 'plan', row 1: 'x' cannot be an id"),
        ("plan", ["1", "2", "9223372036854775808"], "row 2: '9223372036854775808' cannot be an id; an int64 id lies in"),
        ("plan", np.array([0, 1 << 63, 1], np.uint64), "column 'plan', row 1: 9223372036854775808 cannot be an id"),
        ("user", [1.0, 0.5, 2.0], "column 'user', row 1: 0.5 cannot be an id"),
        ("user", [b"a", b"b", b"c"], "column 'user' is of type binary; a string id takes strings and integers"),
        ("tags", [1, 2, 3], "column 'tags' is of type int64; a feature with many ids takes lists of int64"),
        ("tags", [[1.0], None, [2.0, 0.5]], "column 'tags', row 2: 0.5 cannot be an id"),
        ("click", [0.0, 2.0, 1.0], "column 'click', row 1: 2.0 is refused; a label is 0 or 1"),
        ("click", [0, None, 1], "column 'click', row 1: None is refused; a label is 0 or 1"),
        ("weight", [1.0, -1.0, 1.0], "column 'weight', row 1: -1.0 is refused; a weight is finite and >= 0"),
        ("session", ["s", None, "t"], "column 'session', row 1: null cannot be a group"),
    ],
)
def test_a_value_that_cannot_be_encoded_is_named(column: str, values: Any, said: str) -> None:
    rows = with_column(column, values)
    with pytest.raises(DataError, match=said):
        TRANSFORM.batch(rows, labels=True)


def test_the_row_in_an_error_counts_from_the_start_of_a_slice() -> None:
    rows = with_column("tags", [[1.0], None, [2.0, 0.5]])
    with pytest.raises(DataError, match="column 'tags', row 1: 0.5"):
        TRANSFORM.batch(rows.slice(1))


@pytest.mark.parametrize("column", sorted(GOOD))
def test_a_missing_column_is_named(column: str) -> None:
    rows = with_column("click", GOOD["click"])
    with pytest.raises(DataError, match=f"column '{column}' is missing; .*valid: "):
        TRANSFORM.batch(rows.drop_columns([column]), labels=True)


def test_a_column_that_is_there_twice_is_refused() -> None:
    rows = with_column("click", GOOD["click"])
    twice = pa.RecordBatch.from_arrays([*rows.columns, rows.column("age")], names=[*rows.schema.names, "age"])
    with pytest.raises(DataError, match="column 'age' is there 2 times"):
        TRANSFORM.batch(twice)


def test_labels_weights_and_groups() -> None:
    batch = TRANSFORM.batch(with_column("click", [True, False, True]))
    assert batch.label_BT is not None
    assert batch.label_BT.tolist() == [[1.0], [0.0], [1.0]]
    assert batch.weight_B is not None
    assert batch.weight_B.tolist() == [1.0, 0.0, 2.5]
    assert batch.group_B is not None
    assert batch.group_B.tolist() == hash_strings(pa.array(GOOD["session"])).view(np.int64).tolist()
    numbered = TRANSFORM.batch(with_column("session", pa.array([3, 3, -1], pa.int16()))).group_B
    assert numbered is not None
    assert numbered.tolist() == [3, 3, -1]
    without = TRANSFORM.batch(with_column("click", GOOD["click"]), labels=False)
    assert without.label_BT is without.weight_B is without.group_B is None
    assert TRANSFORM.batch(table([dict.fromkeys(STRATEGIES)])).label_BT is None


def test_a_transform_needs_a_fitted_spec() -> None:
    features = [
        {"kind": "id", "name": "user", "role": "user"},
        {"kind": "numeric", "name": "age", "role": "user", "transform": {"kind": "standardise"}},
        {"kind": "numeric", "name": "price", "role": "item", "transform": {"kind": "bucketize"}},
    ]
    with pytest.raises(SpecError, match="the spec is not fitted: user, age, price; run `ninerank features fit`"):
        Transform(FeatureSpec.parse({"labels": ["click"], "features": features}, "spec"))


def test_a_default_that_the_vocabulary_does_not_know_takes_row_zero() -> None:
    feature = {"kind": "id", "name": "city", "role": "user", "default": "paris", "encoding": {"kind": "vocabulary", "values": ["rome"]}}
    spec = FeatureSpec.parse({"labels": ["click"], "features": [feature]}, "spec")
    assert Transform(spec).batch(pa.record_batch({"city": ["rome", None]})).request.single.values.tolist() == [1, 0]


@pytest.mark.parametrize(
    "transform",
    [
        {"kind": "raw"},
        {"kind": "log"},
        {"kind": "standardise", "mean": 1.5, "std": 0.3},
        {"kind": "bucketize", "boundaries": [1.0, 2.0, 3.0]},
    ],
    ids=lambda transform: transform["kind"],
)
def test_a_missing_number_is_read_as_its_default(transform: dict[str, Any]) -> None:
    feature = {"kind": "numeric", "name": "price", "role": "item", "transform": transform, "default": 2.5}
    block = (
        Transform(FeatureSpec.parse({"labels": ["click"], "features": [feature]}, "spec"))
        .batch(pa.record_batch({"price": [2.5, None]}))
        .item
    )
    bucketised = transform["kind"] == "bucketize"
    there, missing = ids_of(block)["price"] if bucketised else bits(block.dense_RF)
    assert there == missing
    assert there != [0]


@pytest.mark.parametrize("transform", [{"kind": "raw"}, {"kind": "standardise", "mean": 0.0, "std": 1e-30}])
def test_a_default_that_does_not_fit_float32_is_refused(transform: dict[str, Any]) -> None:
    feature = {"kind": "numeric", "name": "price", "role": "item", "transform": transform, "default": 1e39}
    with pytest.raises(SpecError, match=r"feature 'price': default 1e\+39 does not fit float32 after its transform"):
        Transform(FeatureSpec.parse({"labels": ["click"], "features": [feature]}, "spec"))


def test_one_request_row_serves_all_candidates() -> None:
    rows = with_column("click", GOOD["click"])
    items = rows.select(list(SPEC.columns("item")))
    batch = TRANSFORM.request(rows.slice(1, 1), items)
    assert isinstance(batch, Batch)
    assert batch.user_row_B is not None
    assert batch.user_row_B.tolist() == [0, 0, 0]
    assert (batch.request.num_rows, batch.item.num_rows, batch.num_rows) == (1, 3, 3)


def test_wrong_request_rows_are_refused() -> None:
    rows = with_column("click", GOOD["click"])
    with pytest.raises(DataError, match="3 request rows without user_row"):
        TRANSFORM.request(rows, rows)
    with pytest.raises(DataError, match="user_row holds 2 rows for 3 candidates"):
        TRANSFORM.request(rows, rows, np.array([0, 1]))
    for wrong in ([0, 1, 3], [-1, 0, 1]):
        with pytest.raises(DataError, match="request rows are 0 .. 2"):
            TRANSFORM.request(rows, rows, np.array(wrong))


def test_a_default_of_a_dynamic_feature_may_be_any_other_id() -> None:
    for default in (0, -1, MISSING_ID + 1, (1 << 63) - 1):
        for multi in (False, True):
            encoding = {"kind": "dynamic"}
            own = {"kind": "id", "name": "a", "role": "user", "dtype": "int64", "encoding": encoding, "multi": multi, "default": default}
            batch = Transform(FeatureSpec.parse({"labels": ["click"], "features": [own]}, "spec")).batch(
                pa.record_batch({"a": pa.array([[None], [MISSING_ID]] if multi else [None, MISSING_ID])})
            )
            assert ids_of(batch.request)["a"] == [[default], [default]]


def test_dynamic_strings_never_collide_with_missing() -> None:
    text = "features"
    seed = _seed_of(text, 1 << 63)
    assert hash_bytes(text.encode(), seed) == 1 << 63
    own = {"kind": "id", "name": "a", "role": "user", "encoding": {"kind": "dynamic", "seed": seed}}
    spec = {"labels": ["click"], "features": [own, {**own, "name": "b", "multi": True}]}
    rows = pa.record_batch({"a": [text], "b": [["", text, None]]})
    assert ids_of(Transform(FeatureSpec.parse(spec, "spec")).batch(rows).request) == {"a": [[MISSING_ID + 1]], "b": [[MISSING_ID + 1]]}


def _seed_of(text: str, wanted: int) -> int:
    """The seed with which the XXH64 of eight bytes of text is `wanted`: every step of the hash can be undone."""
    p1, p2, p3, p4, p5 = (int(p) for p in (P1, P2, P3, P4, P5))
    word, modulus = int.from_bytes(text.encode(), "little"), 1 << 64
    h = wanted ^ (wanted >> 32)
    h = h * pow(p3, -1, modulus) % modulus
    h ^= (h >> 29) ^ (h >> 58)
    h = h * pow(p2, -1, modulus) % modulus
    h ^= h >> 33
    h = (h - p4) * pow(p1, -1, modulus) % modulus
    h = ((h >> 27) | (h << 37)) % modulus
    lane = word * p2 % modulus
    lane = ((lane << 31) | (lane >> 33)) % modulus * p1 % modulus
    return ((h ^ lane) - 8 - p5) % modulus


def test_no_rows_give_an_empty_batch() -> None:
    batch = TRANSFORM.batch(table([]))
    assert batch.num_rows == 0
    assert batch.item.dense_RF.shape == (0, 1)
    assert batch.request.single.values.shape == (0,)


def test_a_large_vocabulary_finds_every_id() -> None:
    values = [f"id-{n}" for n in range(20_000)]
    feature = {"kind": "id", "name": "user", "role": "user", "encoding": {"kind": "vocabulary", "values": values}}
    transform = Transform(FeatureSpec.parse({"labels": ["click"], "features": [feature]}, "spec"))
    found = transform.batch(pa.record_batch({"user": [*values, "id-20000", "id-"]})).request.single.values
    assert found.tolist() == [*range(1, 20_001), 0, 0]


def test_threads_may_share_a_transform() -> None:
    rows = with_column("click", GOOD["click"])
    expected = TRANSFORM.batch(rows)
    with ThreadPoolExecutor(4) as pool:
        for batch in pool.map(lambda _: TRANSFORM.batch(rows), range(64)):
            same(expected.request, [batch.request])
            same(expected.item, [batch.item])
