"""The lookup of served requests gives what the collection's operators give, bit for bit where these only copy."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.quantize import TableDtype, quantize
from ninerank.embedding.request import RequestLookup
from ninerank.errors import DataError
from ninerank.features.batch import Batch, KeyedJagged
from ninerank.features.spec import Dynamic, FeatureSpec, IdFeature

MakeBatch = Callable[..., Batch]
DIMS = {"deep": 8, "odd": 5, "linear": 1}


def collection_of(spec: FeatureSpec, dtype: TableDtype = "fp32", padding: str = "longest") -> EmbeddingCollection:
    config = EmbeddingConfig.parse({"init_std": 0.5, "sequence_length": padding}, "embedding")
    drawn = EmbeddingCollection(spec, DIMS, config, seed=3)
    if dtype == "fp32":
        return drawn
    return EmbeddingCollection.of_tables(spec, {name: quantize(group.storage, dtype) for name, group in drawn.named_groups()}, config)


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("padding", ["longest", "max"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 30), requests=st.one_of(st.none(), st.integers(1, 4)), most=st.integers(0, 6), seed=st.integers(0, 999))
def test_sides_equal_those_of_the_operators(
    spec: FeatureSpec, make_batch: MakeBatch, dtype: TableDtype, padding: str, rows: int, requests: int | None, most: int, seed: int
) -> None:
    batch, collection = make_batch(spec, rows, requests=requests, most=most, seed=seed), collection_of(spec, dtype, padding)
    with torch.inference_mode():
        same(RequestLookup(collection).sides(batch), collection.sides(batch))


def test_what_a_graph_rounds_next_comes_rounded_once(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    collection, batch = collection_of(spec), make_batch(spec, 9, requests=1, seed=4)
    exact = RequestLookup(collection).sides(batch)
    names = ["deep.item", "deep.seq.similar", "odd.item"]
    got = RequestLookup(collection, dict.fromkeys(names, torch.bfloat16)).sides(batch)
    # The calls of "odd" write fields and sequences, and sequences are wanted in float32 there.
    assert {name for name, value in got.items() if value.dtype == torch.bfloat16} == {"deep.item", "deep.seq.similar"}
    for name in ("deep.item", "deep.seq.similar"):
        assert torch.equal(got[name], exact[name].to(torch.bfloat16))
    same({name: value for name, value in got.items() if value.dtype != torch.bfloat16}, {n: exact[n] for n in got if n not in names[:2]})


@pytest.mark.parametrize("kind", ["single", "bags", "sequences"])
@pytest.mark.parametrize("wrong", [-1, 31, 1 << 40])
def test_ids_outside_their_table_are_refused_by_name(spec: FeatureSpec, make_batch: MakeBatch, kind: str, wrong: int) -> None:
    batch, lookup = make_batch(spec, 6, requests=1, most=3, seed=2), RequestLookup(collection_of(spec))
    ids: KeyedJagged = getattr(batch.item, kind)
    values = ids.values.clone()
    values[-1] = wrong
    with pytest.raises(DataError, match=f"{ids.keys[-1]}.*id {wrong} is outside table"):
        lookup.sides(replace(batch, item=replace(batch.item, **{kind: replace(ids, values=values)})))


def test_histories_that_are_too_long_are_refused(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batch, lookup = make_batch(spec, 3, requests=1, most=2, seed=2), RequestLookup(collection_of(spec, padding="max"))
    none = torch.zeros(0, dtype=torch.int64)
    own = replace(batch.request.sequences, values=torch.cat([none, torch.ones(9, dtype=torch.int64)]), lengths=torch.tensor([9, 0]))
    with pytest.raises(DataError, match="'recent': 9 ids in a row, at most 6"):
        lookup.sides(replace(batch, request=replace(batch.request, sequences=own)))


def test_only_static_tables_on_the_host_are_taken(narrow_spec: FeatureSpec) -> None:
    (first, *others) = narrow_spec.features
    assert isinstance(first, IdFeature)
    dynamic = narrow_spec.model_copy(update={"features": (first.model_copy(update={"encoding": Dynamic()}), *others)})
    collection = collection_of(dynamic)
    assert RequestLookup.takes(collection_of(narrow_spec))
    assert not RequestLookup.takes(collection)
    with pytest.raises(ValueError, match="static tables"):
        RequestLookup(collection)


def test_rows_written_in_place_are_seen_and_threads_do_not_disturb_each_other(narrow_spec: FeatureSpec, make_batch: MakeBatch) -> None:
    collection = collection_of(narrow_spec)
    lookup = RequestLookup(collection)
    batches = [make_batch(narrow_spec, rows, requests=1, seed=rows) for rows in range(1, 9)]
    with torch.no_grad():
        for _, group in collection.named_groups():
            group.storage.mul_(2)
        wanted = [collection.sides(batch) for batch in batches]
    wrong: list[BaseException] = []

    def work(place: int) -> None:
        try:
            for _ in range(30):
                same(lookup.sides(batches[place]), wanted[place])
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
