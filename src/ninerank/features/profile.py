"""What a spec meets in a log: shares of missing and unknown values, ranges of numbers, lengths of bags, positives."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ninerank.features.columns import arrow_type, column_of, conform
from ninerank.features.spec import MISSING_ID, Feature, FeatureSpec, IdFeature, NumericFeature, SequenceFeature

__all__ = ["Profile"]


class Profile:
    """Running counts over batches, as a `Reader` with the same spec gives them."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.num_rows = 0
        self._spec = spec
        self._features = [(feature, _Column(spec, feature)) for feature in spec.features]
        self._positives = np.zeros(len(spec.labels))

    def update(self, rows: pa.RecordBatch) -> None:
        """Count a batch; raises DataError for a column that is missing or of a wrong type."""
        for feature, column in self._features:
            column.update(conform(column_of(rows, feature.column), column.type, feature.column))
        for task, label in enumerate(self._spec.labels):
            self._positives[task] += pc.sum(conform(column_of(rows, label), pa.float64(), label)).as_py() or 0.0
        self.num_rows += rows.num_rows

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, to print or to write as JSON.

        Per feature: missing_share, rows without a value (an empty list, for bags and sequences); for a fitted vocabulary unknown_share,
        ids outside it among those that are there (else None); min and max of numbers; mean_length of bags and sequences.
        """
        count = max(self.num_rows, 1)
        rates = {label: float(positives / count) for label, positives in zip(self._spec.labels, self._positives, strict=True)}
        features = {f.name: {"kind": f.kind, "column": f.column, **column.as_dict(count)} for f, column in self._features}
        return {"num_rows": self.num_rows, "positive_rate": rates, "features": features}


class _Column:
    def __init__(self, spec: FeatureSpec, feature: Feature) -> None:
        self.type = arrow_type(spec, feature)
        self.known: pa.Array | None = None
        self.missing = self.ids = self.unknown = 0
        self.low, self.high = np.inf, -np.inf
        source = spec.source_of(feature) if isinstance(feature, SequenceFeature) else feature
        if isinstance(source, IdFeature) and source.encoding.kind == "vocabulary" and source.encoding.values is not None:
            self.known = pa.array(source.encoding.values, pa.string() if source.dtype == "string" else pa.int64())
        self.is_number = isinstance(source, NumericFeature)
        self.is_dynamic = isinstance(source, IdFeature) and source.is_dynamic

    def update(self, array: pa.Array) -> None:
        is_list = pa.types.is_list(array.type)
        values = (array.flatten() if is_list else array).drop_null()
        if pa.types.is_string(values.type):
            values = values.filter(pc.not_equal(values, ""))
        elif self.is_dynamic:
            values = values.filter(pc.not_equal(values, MISSING_ID))
        self.ids += len(values)
        self.missing += len(array) - (int(pc.sum(pc.greater(pc.list_value_length(array), 0)).as_py() or 0) if is_list else len(values))
        if self.known is not None:
            self.unknown += len(values) - int(pc.sum(pc.is_in(values, self.known)).as_py() or 0)
        if self.is_number and len(values):
            found = pc.min_max(values)
            self.low, self.high = min(self.low, found["min"].as_py()), max(self.high, found["max"].as_py())

    def as_dict(self, num_rows: int) -> dict[str, Any]:
        own: dict[str, Any] = {"missing_share": self.missing / num_rows, "unknown_share": None}
        if self.known is not None:
            own["unknown_share"] = self.unknown / max(self.ids, 1)
        if self.is_number and self.low <= self.high:
            own |= {"min": self.low, "max": self.high}
        if pa.types.is_list(self.type):
            own["mean_length"] = self.ids / num_rows
        return own
