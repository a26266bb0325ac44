"""The compiled spec: Arrow record batches in, `Batch` out, the same bits offline and online.

`Transform.batch` takes log rows; `Transform.request` takes request rows once and candidate rows apart. Both encode each row by itself
with the same scalar code (`kernels`), so that how rows are split into batches changes nothing. A Transform is immutable and may be
shared by threads; encoding runs without the GIL.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ninerank.errors import DataError, SpecError
from ninerank.features import kernels
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.columns import Allowed, arrow_type, column_of, conform, is_label, is_weight, show
from ninerank.features.encoding import MISSING_ID, Bucketize, Dynamic, Hashed, Log, Numbered, Standardise
from ninerank.features.hashing import hash_strings
from ninerank.features.spec import FeatureSpec, IdFeature, NumericFeature, SequenceFeature, Side
from ninerank.features.vocabulary import CompiledVocabulary

__all__ = ["Transform"]


class Transform:
    """Encoder of one fitted spec; raises SpecError for a spec that is not fitted.

    >>> from ninerank.features.spec import FeatureSpec, Hashed, IdFeature
    >>> spec = FeatureSpec(labels=("click",), features=(IdFeature(name="user", role="user", encoding=Hashed(num_buckets=10)),))
    >>> Transform(spec).batch(pa.record_batch({"user": ["ann", None]})).request.single.values
    tensor([9, 0])
    """

    def __init__(self, spec: FeatureSpec) -> None:
        unfitted = [f.name for f in spec.features if not isinstance(f, SequenceFeature) and not f.is_fitted]
        if unfitted:
            raise SpecError(f"the spec is not fitted: {', '.join(unfitted)}; run `ninerank features fit` or fit() first")
        self.spec = spec
        vocabularies: dict[str, CompiledVocabulary] = {}
        self._request = _Side(spec, "request", vocabularies)
        self._item = _Side(spec, "item", vocabularies)

    def batch(self, rows: pa.RecordBatch, labels: bool | None = None) -> Batch:
        """Encode B log rows, both sides at B rows.

        labels: True demands label, weight and group columns as the spec names them, False leaves them out, None takes those that are there
        (labels all or none). Raises DataError for a missing column, a wrong type, a value that cannot be an id, a number that is not
        finite, a label outside {0, 1}.
        """
        label, weight, group = self._answers(rows, labels)
        request, item = self._request.encode(rows, rows.num_rows), self._item.encode(rows, rows.num_rows)
        return Batch(request, item, label_BT=label, weight_B=weight, group_B=group)

    def request(self, user: pa.RecordBatch, items: pa.RecordBatch, user_row: npt.NDArray[np.int64] | None = None) -> Batch:
        """Encode U request rows and N candidate rows; `user_row[n]` is candidate n's request row (all 0 if not given, then U is 1).

        Raises DataError as `batch` does, and for user rows that are not there.
        """
        count = user.num_rows
        if not self.spec.columns("request"):
            # A record batch without columns cannot say how many rows it has.
            count = max(count, 1 if user_row is None else int(np.max(user_row, initial=0)) + 1)
        if user_row is None:
            if count != 1:
                raise DataError(f"{count} request rows without user_row; give the request row of each candidate, or one request row")
            user_row = np.zeros(items.num_rows, np.int64)
        if len(user_row) != items.num_rows:
            raise DataError(f"user_row holds {len(user_row)} rows for {items.num_rows} candidates; one a candidate is needed")
        if len(user_row) and (user_row.min() < 0 or user_row.max() >= count):
            raise DataError(f"user_row spans {user_row.min()} .. {user_row.max()}; request rows are 0 .. {count - 1}")
        own = torch.from_numpy(np.ascontiguousarray(user_row, np.int64))
        return Batch(self._request.encode(user, count), self._item.encode(items, items.num_rows), user_row_B=own)

    def side(self, side: Side, rows: pa.RecordBatch, count: int) -> Block:
        """Encode `count` rows of one side alone. Raises DataError as `batch` does."""
        return (self._request if side == "request" else self._item).encode(rows, count)

    def _answers(self, rows: pa.RecordBatch, labels: bool | None) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        spec, there = self.spec, set(rows.schema.names)
        if labels is False:
            return None, None, None
        label = weight = group = None
        if labels or there.issuperset(spec.labels):
            label_BT = np.empty((rows.num_rows, len(spec.labels)), np.float32)
            for task, column in enumerate(spec.labels):
                label_BT[:, task] = _answer(rows, column, is_label, "a label is 0 or 1")
            label = torch.from_numpy(label_BT)
        if spec.weight and (labels or spec.weight in there):
            weight_B = _answer(rows, spec.weight, is_weight, "a weight is finite and >= 0")
            weight = torch.from_numpy(weight_B.astype(np.float32))
        if spec.group and (labels or spec.group in there):
            group = torch.from_numpy(_groups(column_of(rows, spec.group), spec.group))
        return label, weight, group


class _Side:
    """Jobs of one side: singles, bags, sequences, dense numbers."""

    def __init__(self, spec: FeatureSpec, side: Side, vocabularies: dict[str, CompiledVocabulary]) -> None:
        self.single = _Jobs(spec, spec.single_keys(side), vocabularies)
        self.bags = _Jobs(spec, spec.bag_keys(side), vocabularies)
        self.sequences = _Jobs(spec, spec.sequence_keys(side), vocabularies)
        self.dense = _Jobs(spec, spec.dense_keys(side), vocabularies)

    def encode(self, rows: pa.RecordBatch, count: int) -> Block:
        return Block(
            self.single.encode_single(rows, count),
            self.bags.encode_bags(rows, count),
            self.sequences.encode_bags(rows, count),
            self.dense.encode_dense(rows, count),
        )


class _Jobs:
    """The kernels' table for some features, its fixed columns filled in; `kernels` names the columns."""

    def __init__(self, spec: FeatureSpec, keys: tuple[str, ...], vocabularies: dict[str, CompiledVocabulary]) -> None:
        self.keys = keys
        features = [spec.feature(key) for key in keys]
        self.columns = [(feature.column, arrow_type(spec, feature)) for feature in features]
        self.fixed = np.zeros((len(keys), kernels.JOB_WIDTH), np.int64)
        self.numbers = np.zeros((len(keys), 3), np.float64)
        self.alive: list[object] = []
        self.bounds: dict[int, tuple[str, int]] = {}
        for f, feature in enumerate(features):
            if isinstance(feature, NumericFeature):
                self._number(f, feature)
            else:
                self._id(f, feature, spec, vocabularies)

    def _id(self, f: int, feature: IdFeature | SequenceFeature, spec: FeatureSpec, vocabularies: dict[str, CompiledVocabulary]) -> None:
        source = spec.source_of(feature) if isinstance(feature, SequenceFeature) else feature
        job = self.fixed[f]
        job[kernels.TYPE] = kernels.STRING if source.dtype == "string" else kernels.INT64
        job[kernels.MAX_LENGTH] = feature.max_length or np.iinfo(np.int64).max
        job[kernels.KEEP_LAST] = isinstance(feature, SequenceFeature)
        if isinstance(source.encoding, Hashed):
            job[kernels.METHOD], job[kernels.SIZE], job[kernels.SEED] = kernels.HASH, source.encoding.num_buckets, source.encoding.seed
        elif isinstance(source.encoding, Numbered):
            job[kernels.METHOD], job[kernels.SIZE] = kernels.NUMBERED, source.encoding.num_ids
            if source.encoding.out_of_range == "clamp":
                job[kernels.SEED] = kernels.CLAMP
            elif source.encoding.out_of_range == "error":
                self.bounds[f] = (source.table_name, source.encoding.num_ids)
        elif isinstance(source.encoding, Dynamic):
            job[kernels.METHOD], job[kernels.SEED], job[kernels.MISSING] = kernels.RAW_ID, source.encoding.seed, MISSING_ID
        else:
            values = source.encoding.values or ()
            vocabulary = vocabularies.get(source.table_name) or CompiledVocabulary.build(values, source.dtype)
            vocabularies[source.table_name] = vocabulary
            job[kernels.METHOD] = kernels.VOCABULARY
            job[kernels.SLOTS], job[kernels.MASK] = vocabulary.addresses
            self.alive.append(vocabulary)
        if isinstance(feature, IdFeature) and feature.default is not None:
            self._default(f, pa.array([feature.default], pa.string() if source.dtype == "string" else pa.int64()))

    def _number(self, f: int, feature: NumericFeature) -> None:
        job, transform = self.fixed[f], feature.transform
        job[kernels.TYPE] = kernels.NUMBER
        if isinstance(transform, Bucketize):
            boundaries = np.array(transform.boundaries, np.float64)
            self.alive.append(boundaries)
            job[kernels.METHOD], job[kernels.SIZE], job[kernels.SLOTS] = kernels.BUCKETS, len(boundaries), boundaries.ctypes.data
        elif isinstance(transform, Standardise):
            job[kernels.METHOD] = kernels.STANDARDISE
            self.numbers[f, :2] = transform.mean, transform.std
        else:
            job[kernels.METHOD] = kernels.LOG if isinstance(transform, Log) else kernels.RAW
        if feature.default is not None:
            self._default(f, pa.array([feature.default], pa.float64()))

    def _default(self, f: int, value: pa.Array) -> None:
        """Encode the default by the job itself, then make it the value of what is missing."""
        job = self.fixed[f : f + 1].copy()
        job[0, : kernels.NUM_DYNAMIC] = _single_place(value)
        if job[0, kernels.TYPE] == kernels.NUMBER and job[0, kernels.METHOD] != kernels.BUCKETS:
            out = np.zeros((1, 1), np.float32)
            if kernels.fill_dense(job, self.numbers[f : f + 1], 1, out) >= 0:
                raise SpecError(f"feature {self.keys[f]!r}: default {show(value[0])} does not fit float32 after its transform")
            self.numbers[f, 2] = out[0, 0]
        else:
            row = np.zeros(1, np.int64)
            kernels.fill_single(job, 1, row)
            # Where a default has row 0 itself, a bag without ids stays empty.
            self.fixed[f, kernels.HAS_DEFAULT] = row[0] != (MISSING_ID if job[0, kernels.METHOD] == kernels.RAW_ID else 0)
            self.fixed[f, kernels.MISSING] = row[0]

    def encode_single(self, rows: pa.RecordBatch, count: int) -> KeyedJagged:
        out = np.empty(len(self.keys) * count, np.int64)
        if out.size:
            arrays = self._arrays(rows)
            bad = kernels.fill_single(self._jobs([_single_place(array) for array in arrays]), count, out)
            self._refuse(bad, arrays, count)
        return KeyedJagged(self.keys, torch.from_numpy(out), None, count)

    def encode_bags(self, rows: pa.RecordBatch, count: int) -> KeyedJagged:
        lengths = np.empty(len(self.keys) * count, np.int64)
        out = np.empty(0, np.int64)
        if lengths.size:
            arrays = self._arrays(rows)
            jobs = self._jobs([_list_place(array) for array in arrays])
            out = np.empty(kernels.bag_lengths(jobs, count, lengths), np.int64)
            kernels.fill_bags(jobs, count, lengths, out)
        return KeyedJagged(self.keys, torch.from_numpy(out), torch.from_numpy(lengths), count)

    def encode_dense(self, rows: pa.RecordBatch, count: int) -> torch.Tensor:
        out = np.empty((count, len(self.keys)), np.float32)
        if out.size:
            arrays = self._arrays(rows)
            bad = kernels.fill_dense(self._jobs([_single_place(array) for array in arrays]), self.numbers, count, out)
            self._refuse(bad, arrays, count)
        return torch.from_numpy(out)

    def _arrays(self, rows: pa.RecordBatch) -> list[pa.Array]:
        """Columns of the features; the caller keeps them alive while kernels read them."""
        arrays = [conform(column_of(rows, column), wanted, column) for column, wanted in self.columns]
        for f, (table, num_ids) in self.bounds.items():
            _check_bounds(arrays[f], self.columns[f][0], table, num_ids)
        return arrays

    def _jobs(self, places: Sequence[tuple[int, ...]]) -> npt.NDArray[np.int64]:
        jobs = self.fixed.copy()
        jobs[:, : kernels.NUM_DYNAMIC] = places
        return jobs

    def _refuse(self, bad: int, arrays: Sequence[pa.Array], count: int) -> None:
        if bad >= 0:
            f, row = divmod(bad, count)
            allowed = "a number is finite, and its transform fits float32"
            raise DataError(f"column {self.columns[f][0]!r}, row {row}: {show(arrays[f][row])} is refused; {allowed}")


def _check_bounds(array: pa.Array, column: str, table: str, num_ids: int) -> None:
    """Raise DataError for an id outside 0 ... num_ids - 1, in a flat column or one of lists."""
    is_list = pa.types.is_list(array.type)
    values = array.flatten() if is_list else array
    outside = pc.or_(pc.less(values, 0), pc.greater_equal(values, num_ids))
    place = pc.index(outside, True).as_py()
    if place >= 0:
        row = pc.list_parent_indices(array)[place].as_py() if is_list else place
        allowed = f"allowed: 0 to {num_ids - 1}, or out_of_range: clamp or default in its encoding"
        raise DataError(f"column {column!r}, row {row}: id {show(values[place])} is outside table {table!r} of {num_ids} ids; {allowed}")


def _single_place(array: pa.Array) -> tuple[int, ...]:
    """The kernels' DATA, OFFSETS, VALID, START and three zeros for a flat array."""
    buffers = array.buffers()
    valid = buffers[0].address if buffers[0] is not None else 0
    data = buffers[-1].address if buffers[-1] is not None else 0
    return data, buffers[1].address if len(buffers) == 3 and buffers[1] is not None else 0, valid, array.offset, 0, 0, 0


def _list_place(array: pa.ListArray) -> tuple[int, ...]:
    buffers = array.buffers()
    return *_single_place(array.values)[:4], buffers[1].address, buffers[0].address if buffers[0] is not None else 0, array.offset


def _answer(rows: pa.RecordBatch, column: str, allowed: Allowed, rule: str) -> npt.NDArray[np.float64]:
    """A label or weight column as float64; raises DataError for a null or a value that `allowed` refuses."""
    array = conform(column_of(rows, column), pa.float64(), column)
    values: npt.NDArray[np.float64] = array.to_numpy(zero_copy_only=False)
    good = allowed(values)
    if not good.all():
        row = int(np.argmin(good))
        raise DataError(f"column {column!r}, row {row}: {show(array[row])} is refused; {rule}")
    return values


def _groups(array: pa.Array, column: str) -> npt.NDArray[np.int64]:
    """Group keys as int64: integers as they are, strings by their hash."""
    if array.null_count:
        row = pc.index(array.is_null(), True).as_py()
        raise DataError(f"column {column!r}, row {row}: null cannot be a group of GAUC; give every row a group")
    if pa.types.is_integer(array.type) and not pa.types.is_uint64(array.type):
        return np.array(array.cast(pa.int64()).to_numpy(), np.int64)
    return hash_strings(conform(array, pa.string(), column)).view(np.int64)
