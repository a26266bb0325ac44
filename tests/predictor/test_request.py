"""What a request must look like before a model sees it."""

import pyarrow as pa
import pytest

from ninerank.errors import RequestError
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.request import RequestSchema, named


@pytest.fixture(scope="module")
def schema(spec: FeatureSpec) -> RequestSchema:
    return RequestSchema.of(spec)


def items(**columns: object) -> pa.RecordBatch:
    return pa.record_batch({name: pa.array(values) for name, values in columns.items()})


USER = items(user_id=["u1"])


def test_columns_come_in_any_order_and_take_the_specs_types(schema: RequestSchema) -> None:
    given = items(price=pa.array([1, 2], pa.int32()), item_id=pa.array(["a", "b"]).dictionary_encode(), tags=[["x"], []])
    request = schema.rank_input(USER, given)
    assert request.items.schema.equals(schema.item)
    assert request.user.schema.equals(schema.request)
    assert request.items.column("price").to_pylist() == [1.0, 2.0]
    assert request.items.column("item_id").to_pylist() == ["a", "b"]
    assert request.items.column("city").to_pylist() == [None, None]


def test_columns_that_nobody_sent_are_named(schema: RequestSchema) -> None:
    _, missing = schema.conform("item", named(items(price=[1.0])), 1)
    assert missing == ("item_id", "tags", "city")


@pytest.mark.parametrize(
    ("user", "candidates", "message"),
    [
        (USER, items(pricee=[1.0]), "unknown item feature 'pricee'; did you mean 'price'"),
        (items(usr_id=["u"]), items(price=[1.0]), "unknown user feature 'usr_id'; did you mean 'user_id'"),
        (USER, items(age=[1.0]), "'age' is a user or context feature, send it on that side"),
        (items(price=[1.0]), items(price=[1.0]), "'price' is an item feature, send it on that side"),
        (items(user_id=["u", "v"]), items(price=[1.0]), "one user row, this one has 2"),
        (USER, items(price=pa.array([], pa.float64())), "1 to 10000 candidates, this one has 0"),
        (USER, items(price=["cheap"]), "'price' is of type string"),
        (USER, items(item_id=[1.5]), "'item_id', row 0"),
        (USER, items(item_id=[["a"]]), "'item_id' is of type list"),
        (USER, items(tags=["a"]), "'tags' is of type string"),
        (USER, items(price=[{"a": 1}]), "'price' is of type struct"),
    ],
)
def test_wrong_requests_are_refused(schema: RequestSchema, user: pa.RecordBatch, candidates: pa.RecordBatch, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        schema.rank_input(user, candidates)


def test_too_many_candidates_are_refused(schema: RequestSchema) -> None:
    with pytest.raises(RequestError, match="1 to 3 candidates, this one has 4"):
        schema.rank_input(USER, items(price=[1.0] * 4), max_candidates=3)


def test_a_column_sent_twice_is_refused(schema: RequestSchema) -> None:
    twice = pa.RecordBatch.from_arrays([pa.array([1.0]), pa.array([2.0])], names=["price", "price"])
    with pytest.raises(RequestError, match="'price' is sent twice"):
        schema.rank_input(USER, twice)


def test_columns_of_another_length_are_refused(schema: RequestSchema) -> None:
    with pytest.raises(RequestError, match="'price' has 3 rows, 2 are needed"):
        schema.conform("item", {"price": pa.array([1.0, 2.0, 3.0])}, 2)


def test_empty_columns_of_no_type_are_missing_values(schema: RequestSchema) -> None:
    request = schema.rank_input(USER, items(price=pa.nulls(2), tags=pa.array([[], []]), item_id=pa.nulls(2, pa.float64())))
    assert request.items.column("price").null_count == 2
    assert request.items.column("tags").to_pylist() == [[], []]
    assert request.items.column("item_id").null_count == 2


def test_joined_rows_repeat_the_user(schema: RequestSchema) -> None:
    rows = schema.joined(schema.rank_input(USER, items(price=[1.0, 2.0])))
    assert rows.num_rows == 2
    assert rows.column("user_id").to_pylist() == ["u1", "u1"]
    assert rows.column("price").to_pylist() == [1.0, 2.0]
