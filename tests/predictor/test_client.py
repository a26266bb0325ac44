"""The client: plain values become a message, and what cannot be sent is said before anything is."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ninerank.errors import NinerankError, RequestError
from ninerank.predictor.client import Defaults, PredictorClient, build_request
from ninerank.predictor.wire import decode_column

USER = {"user_id": "u1", "age": 3, "history": ["a", "b"], "unset": None}


def columns(request: Any) -> dict[str, list[Any]]:
    return {column.name: decode_column(column, request.num_candidates).to_pylist() for column in request.item_features}


@pytest.mark.parametrize(
    "items",
    [
        {"item_id": ["a", "b"], "price": [1.5, None], "tags": [["x"], []]},
        [{"item_id": "a", "price": 1.5, "tags": ["x"]}, {"item_id": "b", "tags": []}],
        {"item_id": pa.array(["a", "b"]), "price": pa.chunked_array([[1.5], [None]]), "tags": pa.array([["x"], []])},
    ],
)
def test_columns_and_rows_say_the_same(items: Any) -> None:
    request = build_request(USER, items)
    assert request.num_candidates == 2
    assert columns(request) == {"item_id": ["a", "b"], "price": [1.5, None], "tags": [["x"], []]}
    assert {column.name: decode_column(column, 1).to_pylist() for column in request.user} == {
        "user_id": ["u1"],
        "age": [3],
        "history": [["a", "b"]],
    }


def test_numpy_arrays_keep_their_type() -> None:
    request = build_request({}, {"a": np.arange(3, dtype=np.int32), "b": np.ones(3, np.float32), "c": np.array(["x", "y", "z"])})
    assert columns(request) == {"a": [0, 1, 2], "b": [1.0, 1.0, 1.0], "c": ["x", "y", "z"]}
    assert request.item_features[1].WhichOneof("values") == "float32_values"


def test_ids_alone_are_enough() -> None:
    request = build_request({}, ids=[7, 8, 9], top_k=2)
    assert (request.num_candidates, request.top_k) == (3, 2)
    assert decode_column(request.candidate_ids, 3).to_pylist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        (None, {}, "neither ids nor items are given"),
        ({"a": [1, 2], "b": [1]}, {}, "candidates are ragged: a has 2, b has 1"),
        ({"a": [1, 2]}, {"ids": ["x"]}, "candidates are ragged: a has 2, ids has 1"),
        ({"a": [1, "x"]}, {}, "feature 'a': its values cannot be sent"),
        ({"a": [2**70]}, {}, "feature 'a': its values cannot be sent"),
        ({"a": 5}, {}, "feature 'a': 5 is no column"),
        ({"a": "text"}, {}, "feature 'a': 'text' is no column"),
        ({"a": [object()]}, {}, "feature 'a': its values cannot be sent"),
        ({"a": [b"x"]}, {}, "cannot send binary"),
        ([{"a": 1}, 5], {}, r"items\[1\] is int"),
        ("text", {}, "items is str"),
        (None, {"ids": "text"}, "feature 'ids': 'text' is no column"),
        ({"a": [1]}, {"top_k": -1}, "top_k is -1"),
    ],
)
def test_what_cannot_be_sent_is_refused(items: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build_request({}, items, **options)


def test_a_server_that_is_not_there_is_named() -> None:
    with PredictorClient("127.0.0.1:1") as client, pytest.raises(NinerankError, match="no server answers at 127.0.0.1:1"):
        client.rank({}, ids=["a"], timeout_ms=2_000)


def test_defaults_are_true_where_there_are_any() -> None:
    assert not Defaults((), (), ())
    assert Defaults((), (), (3,))


@pytest.mark.parametrize(
    ("items", "said"),
    [([], "^items is empty, and no ids are given"), ({}, "^items is empty"), ([{}, {}], "^the candidates of items have no features")],
)
def test_candidates_without_anything_are_refused(items: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        build_request({"age": 30}, items)
    assert build_request({"age": 30}, items, ids=["a"]).num_candidates == 1
