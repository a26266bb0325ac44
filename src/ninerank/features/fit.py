"""Fitting: vocabularies, moments and quantile boundaries from a sample of rows, in one pass, mergeable over parts.

The result depends on the rows alone, not on their order or batches, up to rounding of mean and std.
"""

import math
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ninerank.errors import DataError
from ninerank.features.columns import arrow_type, column_of, conform
from ninerank.features.spec import Bucketize, Feature, FeatureSpec, IdFeature, NumericFeature, SequenceFeature, Standardise, Vocabulary

__all__ = ["Fitter", "fit"]

COMPACT_ROWS = 1 << 21


def fit(spec: FeatureSpec, batches: Iterable[pa.RecordBatch]) -> FeatureSpec:
    """A new spec with vocabularies, moments and boundaries learned from `batches`; what the spec already states is kept.

    A vocabulary counts the ids of all id features of its table and of their sequences. Raises DataError for rows that do not fit the spec,
    and when there are none.

    >>> spec = FeatureSpec(labels=("y",), features=(IdFeature(name="city", role="user"),))
    >>> fit(spec, [pa.record_batch({"city": ["b", "a", "b", None]})]).features[0].encoding.values
    ('b', 'a')
    """
    fitter = Fitter(spec)
    for batch in batches:
        fitter.update(batch)
    return fitter.finish()


class Fitter:
    """Accumulates what a spec needs to be fitted: `update` with rows, `merge` with a fitter of other rows, then `finish`."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self.num_rows = 0
        self._tables: dict[str, _Counts] = {}
        self._moments: dict[str, _Moments] = {}
        self._values: dict[str, _Counts] = {}
        self._sources: list[tuple[Feature, _Counts | _Moments]] = []
        for feature in spec.features:
            source = spec.source_of(feature) if isinstance(feature, SequenceFeature) else feature
            if source.is_fitted:
                continue
            state: _Counts | _Moments
            if isinstance(source, IdFeature):
                state = self._tables.setdefault(source.table_name, _Counts(pa.string() if source.dtype == "string" else pa.int64()))
            elif isinstance(source.transform, Standardise):
                state = self._moments.setdefault(source.name, _Moments())
            else:
                state = self._values.setdefault(source.name, _Counts(pa.float64()))
            self._sources.append((feature, state))

    def update(self, rows: pa.RecordBatch) -> None:
        """Take in a batch of rows."""
        for feature, state in self._sources:
            array = conform(column_of(rows, feature.column), arrow_type(self.spec, feature), feature.column)
            if pa.types.is_list(array.type):
                array = array.flatten()
            array = array.drop_null()
            if pa.types.is_floating(array.type) and not pc.all(pc.is_finite(array), min_count=0).as_py():
                raise DataError(f"column {feature.column!r} holds a number that is not finite; leave a missing one empty (null)")
            state.update(array)
        self.num_rows += rows.num_rows

    def merge(self, other: "Fitter") -> None:
        """Take in what a fitter of the same spec saw in other rows."""
        if other.spec != self.spec:
            raise DataError("fitters of different specs cannot be merged")
        for (_, mine), (_, theirs) in zip(self._unique(), other._unique(), strict=True):
            mine.merge(theirs)  # type: ignore[arg-type]
        self.num_rows += other.num_rows

    def _unique(self) -> "list[tuple[str, _Counts | _Moments]]":
        return [*self._tables.items(), *self._moments.items(), *self._values.items()]

    def finish(self) -> FeatureSpec:
        """The fitted spec; raises DataError if no rows were seen."""
        if self.num_rows == 0:
            raise DataError("no rows to fit the spec on")
        vocabularies: dict[str, Vocabulary] = {}
        features: list[Feature] = []
        for feature in self.spec.features:
            if isinstance(feature, IdFeature) and not feature.is_fitted:
                name = feature.table_name
                if name not in vocabularies:
                    encoding = feature.encoding
                    assert isinstance(encoding, Vocabulary)
                    vocabularies[name] = encoding.model_copy(update={"values": self._tables[name].most_frequent(encoding)})
                features.append(feature.model_copy(update={"encoding": vocabularies[name]}))
            elif isinstance(feature, NumericFeature) and not feature.is_fitted:
                learned = self._state(feature) if feature.name in self._moments else self._boundaries(feature)
                features.append(feature.model_copy(update={"transform": feature.transform.model_copy(update=learned)}))
            else:
                features.append(feature)
        return self.spec.model_copy(update={"features": tuple(features)})

    def _state(self, feature: NumericFeature) -> dict[str, object]:
        mean, std = self._moments[feature.name].state()
        if not np.isfinite([mean, std]).all():
            raise DataError(
                f"column {feature.column!r}: its mean or standard deviation overflows float64; use transform log, or scale it down"
            )
        return {"mean": mean, "std": std}

    def _boundaries(self, feature: NumericFeature) -> dict[str, object]:
        assert isinstance(feature.transform, Bucketize)
        return {"boundaries": self._values[feature.name].quantiles(feature.transform.num_buckets)}


class _Counts:
    """How often each value was met, exact; memory grows with the number of distinct values."""

    def __init__(self, value_type: pa.DataType) -> None:
        self.schema = pa.schema([("value", value_type), ("count", pa.int64())])
        self.parts: list[pa.Table] = []
        self.held = 0

    def update(self, array: pa.Array) -> None:
        counted = pc.value_counts(array)
        self._add(pa.table([counted.field("values"), counted.field("counts")], schema=self.schema))

    def merge(self, other: "_Counts") -> None:
        self._add(other.table())

    def _add(self, part: pa.Table) -> None:
        self.parts.append(part)
        self.held += part.num_rows
        if self.held > max(COMPACT_ROWS, 4 * self.parts[0].num_rows):
            self.table()

    def table(self) -> pa.Table:
        joined = pa.concat_tables([self.schema.empty_table(), *self.parts])
        total = joined.group_by("value").aggregate([("count", "sum")]).select(["value", "count_sum"]).rename_columns(["value", "count"])
        self.parts, self.held = [total], total.num_rows
        return total

    def most_frequent(self, encoding: Vocabulary) -> tuple[object, ...]:
        table = self.table()
        table = table.filter(pc.greater_equal(table["count"], encoding.min_count))
        if pa.types.is_string(self.schema.field("value").type):
            table = table.filter(pc.not_equal(table["value"], ""))
        order = pc.sort_indices(table, [("count", "descending"), ("value", "ascending")])
        try:
            return tuple(table["value"].take(order[: encoding.max_size]).to_pylist())
        except UnicodeDecodeError as error:
            raise DataError(f"an id is not UTF-8 text: {error}") from None

    def quantiles(self, num_buckets: int) -> tuple[float, ...]:
        """Values that start a new bucket: the smallest with at least k / num_buckets of the rows below, each once."""
        table = self.table()
        order = pc.sort_indices(table["value"])
        values = table["value"].take(order).to_numpy()
        if not len(values):
            return ()
        below = np.concatenate([[0], np.cumsum(table["count"].take(order).to_numpy())])
        wanted = np.arange(1, num_buckets) * below[-1] / num_buckets
        starts = np.unique(np.searchsorted(below[:-1], wanted, side="left"))
        return tuple(float(v) for v in values[starts[(starts > 0) & (starts < len(values))]])


class _Moments:
    """Count, mean and sum of squared deviations, merged pairwise (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, array: pa.Array) -> None:
        values = array.to_numpy(zero_copy_only=False)
        if len(values):
            with np.errstate(over="ignore", invalid="ignore"):
                mean = float(values.mean())
                self._add(len(values), mean, float(((values - mean) ** 2).sum()))

    def merge(self, other: "_Moments") -> None:
        self._add(other.count, other.mean, other.squares)

    def _add(self, count: int, mean: float, squares: float) -> None:
        if count:
            total, delta = self.count + count, mean - self.mean
            self.squares += squares + delta * delta * self.count * count / total
            self.mean += delta * count / total
            self.count = total

    def state(self) -> tuple[float, float]:
        """Mean and standard deviation, 1 for a constant; not finite where a sum overflowed."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return self.mean, 1.0 if std == 0 else std
