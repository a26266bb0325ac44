"""What fitting learns, against numpy and by hand; and that batches and order do not matter."""

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.features.fit import Fitter, fit
from ninerank.features.spec import Bucketize, FeatureSpec, IdFeature, NumericFeature, Standardise, Vocabulary


def spec_of(*features: dict[str, Any]) -> FeatureSpec:
    return FeatureSpec.parse({"labels": ["click"], "features": list(features)}, "spec")


def city(**encoding: Any) -> dict[str, Any]:
    return {"kind": "id", "name": "city", "role": "user", "encoding": {"kind": "vocabulary", **encoding}}


def number(transform: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "numeric", "name": "x", "role": "item", "transform": transform}


def known(spec: FeatureSpec, name: str = "city") -> list[int | str]:
    feature = spec.feature(name)
    assert isinstance(feature, IdFeature)
    assert isinstance(feature.encoding, Vocabulary)
    assert feature.encoding.values is not None
    return list(feature.encoding.values)


def boundaries(spec: FeatureSpec) -> list[float]:
    feature = spec.feature("x")
    assert isinstance(feature, NumericFeature)
    assert isinstance(feature.transform, Bucketize)
    assert feature.transform.boundaries is not None
    return list(feature.transform.boundaries)


def moments(spec: FeatureSpec) -> tuple[float, float]:
    feature = spec.feature("x")
    assert isinstance(feature, NumericFeature)
    assert isinstance(feature.transform, Standardise)
    assert feature.transform.mean is not None
    assert feature.transform.std is not None
    return feature.transform.mean, feature.transform.std


CITIES = pa.record_batch({"city": ["b", "a", "c", "b", None, "a", "", "d", "a"]})


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ({}, ["a", "b", "c", "d"]),
        ({"min_count": 2}, ["a", "b"]),
        ({"min_count": 4}, []),
        ({"max_size": 3}, ["a", "b", "c"]),
        ({"min_count": 2, "max_size": 1}, ["a"]),
    ],
)
def test_a_vocabulary_is_most_frequent_first_ties_by_value(encoding: dict[str, Any], expected: list[str]) -> None:
    fitted = fit(spec_of(city(**encoding)), [CITIES])
    assert known(fitted) == expected
    assert fitted.is_fitted
    assert fitted.tables["city"].num_rows == 1 + len(expected)


def test_fitting_returns_a_new_spec_and_leaves_the_old_one() -> None:
    spec = spec_of(city())
    before = spec.digest
    fitted = fit(spec, [CITIES])
    assert not spec.is_fitted
    assert spec.digest == before != fitted.digest


def test_a_table_counts_ids_of_all_its_features_and_sequences() -> None:
    item = {
        "kind": "id",
        "name": "item",
        "role": "item",
        "dtype": "int64",
        "table": "goods",
        "encoding": {"kind": "vocabulary", "min_count": 2},
    }
    related = {**item, "name": "related", "multi": True}
    seen = {"kind": "sequence", "name": "seen", "role": "user", "of": "item"}
    rows = pa.record_batch({"item": [1, 2], "related": [[3, 4], None], "seen": [[4, 4, 1], [9, None]]})
    fitted = fit(spec_of(item, related, seen), [rows])
    assert known(fitted, "item") == known(fitted, "related") == [4, 1]
    assert fitted.tables["goods"].features == ("item", "related", "seen")


def test_what_a_spec_states_is_kept() -> None:
    spec = spec_of(city(values=["z"]), number({"kind": "standardise", "mean": 5.0, "std": 2.0}))
    assert fit(spec, [pa.record_batch({"other": [1]})]) == spec


def test_a_dynamic_feature_has_nothing_to_fit() -> None:
    own = {**city(), "encoding": {"kind": "dynamic"}}
    assert spec_of(own).is_fitted
    spec = spec_of(own, number({"kind": "standardise"}))
    assert fit(spec, [pa.record_batch({"x": [1.0]})]).features[0] == spec.features[0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60))
def test_moments_agree_with_numpy(values: list[float]) -> None:
    mean, std = moments(fit(spec_of(number({"kind": "standardise"})), [pa.record_batch({"x": pa.array([*values, None], pa.float64())})]))
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    expected = np.std(values)
    assert std == pytest.approx(expected, rel=1e-6, abs=1e-9) or (expected < 1e-9 and std == 1.0)


def test_moments_of_large_numbers_do_not_cancel() -> None:
    values = 1e9 + np.random.default_rng(0).normal(size=10_000)
    parts = [pa.record_batch({"x": part}) for part in np.array_split(values, 7)]
    mean, std = moments(fit(spec_of(number({"kind": "standardise"})), parts))
    assert mean == pytest.approx(values.mean(), rel=1e-14)
    assert std == pytest.approx(values.std(), rel=1e-6)


@pytest.mark.parametrize("values", [[3.0, 3.0], [None, None], [0.0]])
def test_a_constant_column_has_std_one(values: list[float | None]) -> None:
    _, std = moments(fit(spec_of(number({"kind": "standardise"})), [pa.record_batch({"x": pa.array(values, pa.float64())})]))
    assert std == 1.0


@given(st.lists(st.one_of(st.none(), st.integers(-20, 20), st.floats(-20, 20)), max_size=80), st.integers(2, 12))
def test_boundaries_are_quantiles(values: list[float | None], num_buckets: int) -> None:
    found = boundaries(fit(spec_of(number({"kind": "bucketize", "num_buckets": num_buckets})), [_numbers([*values, None])]))
    there = np.sort([value for value in values if value is not None])
    assert len(found) < num_buckets
    assert found == sorted(set(found))
    expected = set()
    for k in range(1, num_buckets):
        starts = [v for v in there if (there < v).sum() >= k * len(there) / num_buckets and (there < v).any()]
        expected |= set(starts[:1])
    assert found == sorted(expected)


def test_boundaries_cut_distinct_numbers_evenly() -> None:
    found = boundaries(fit(spec_of(number({"kind": "bucketize", "num_buckets": 4})), [_numbers(list(range(100)))]))
    assert found == [25.0, 50.0, 75.0]


def test_one_frequent_number_makes_fewer_buckets() -> None:
    found = boundaries(fit(spec_of(number({"kind": "bucketize", "num_buckets": 4})), [_numbers([0.0] * 90 + [1.0] * 10)]))
    assert found == [1.0]
    assert boundaries(fit(spec_of(number({"kind": "bucketize"})), [_numbers([2.0, 2.0])])) == []


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-5, 5)), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=4),
    st.randoms(use_true_random=False),
)
def test_batches_order_and_merging_do_not_matter(rows: list[tuple[str, int]], cuts: list[int], random: Any) -> None:
    spec = spec_of(city(min_count=2), number({"kind": "bucketize", "num_buckets": 3}))
    whole = fit(spec, [_table(rows)])
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    shuffled = rows[:]
    random.shuffle(shuffled)
    parts = [_table(shuffled[a:b]) for a, b in pairwise(bounds)]
    assert fit(spec, parts).digest == whole.digest
    fitters = [Fitter(spec) for _ in parts]
    for fitter, part in zip(fitters, parts, strict=True):
        fitter.update(part)
    for other in fitters[1:]:
        fitters[0].merge(other)
    assert fitters[0].finish().digest == whole.digest
    assert fitters[0].num_rows == len(rows)


def test_merged_moments_are_those_of_all_rows() -> None:
    spec = spec_of(number({"kind": "standardise"}))
    values = np.random.default_rng(1).lognormal(size=3000)
    one, other = Fitter(spec), Fitter(spec)
    one.update(_numbers(values[:100].tolist()))
    other.update(_numbers(values[100:].tolist()))
    one.merge(other)
    assert moments(one.finish()) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_counts_survive_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ninerank.features.fit.COMPACT_ROWS", 8)
    ids = np.random.default_rng(0).zipf(1.5, 2000) % 97
    spec = spec_of({**city(min_count=3), "dtype": "int64"})
    fitted = fit(spec, [pa.record_batch({"city": part}) for part in np.array_split(ids, 50)])
    values, counts = np.unique(ids, return_counts=True)
    order = np.lexsort((values, -counts))
    assert known(fitted) == [int(values[i]) for i in order if counts[i] >= 3]


def test_integers_and_strings_of_an_int64_feature_are_one_id() -> None:
    spec = spec_of({**city(), "dtype": "int64"})
    fitted = fit(spec, [pa.record_batch({"city": pa.array([5, 6], pa.int32())}), pa.record_batch({"city": ["5", None]})])
    assert known(fitted) == [5, 6]


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "no rows to fit the spec on"),
        ([CITIES.slice(0, 0)], "no rows to fit the spec on"),
        ([pa.record_batch({"cities": ["a"]})], "column 'city' is missing; did you mean 'cities'"),
        ([pa.record_batch({"city": [[1]]})], "column 'city' is of type list"),
    ],
)
def test_rows_that_do_not_fit_are_refused(batches: list[pa.RecordBatch], said: str) -> None:
    with pytest.raises(DataError, match=said):
        fit(spec_of(city()), batches)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["standardise", "bucketize"])
def test_a_number_that_is_not_finite_is_refused(kind: str, bad: float) -> None:
    with pytest.raises(DataError, match="column 'x' holds a number that is not finite"):
        fit(spec_of(number({"kind": kind})), [_numbers([1.0, bad])])


@pytest.mark.parametrize("values", [[1e308, 1.7e308], [1e200, -1e200], [-1.7e308, 1.7e308]])
def test_moments_that_overflow_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="column 'x': its mean or standard deviation overflows float64"):
        fit(spec_of(number({"kind": "standardise"})), [_numbers(values), _numbers(values[::-1])])


def test_fitters_of_different_specs_are_not_merged() -> None:
    with pytest.raises(DataError, match="different specs"):
        Fitter(spec_of(city())).merge(Fitter(spec_of(city(min_count=2))))


def _numbers(values: list[Any]) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array(values, pa.float64())})


def _table(rows: list[tuple[str, int]]) -> pa.RecordBatch:
    return pa.record_batch({"city": [name for name, _ in rows], "x": pa.array([float(x) for _, x in rows])})
