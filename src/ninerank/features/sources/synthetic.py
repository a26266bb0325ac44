"""A click log drawn from a known ground truth (`world`), so that a model's distance from the best possible can be told.

train.parquet valid.parquet test.parquet    requests in time order, each with its candidates in adjacent rows
items.parquet                               one row an item: its id and all item features
<split>_truth.parquet                       true probability of each row, in the order of <split>.parquet
spec.yaml                                   feature spec, not fitted
truth.json                                  Bayes AUC and log loss of each split: what the true probabilities reach
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config, read_mapping
from ninerank.errors import DataError
from ninerank.features.sources.world import Effects, World, hour_of
from ninerank.features.spec import Bucketize, FeatureSpec, IdFeature, Log, NumericFeature, SequenceFeature, Standardise, Vocabulary
from ninerank.files import replacing
from ninerank.metrics import auc, logloss

__all__ = ["SplitTruth", "SyntheticConfig", "SyntheticTruth", "generate", "synthetic_spec"]

SPLITS = ("train", "valid", "test")
REQUESTS_PER_CHUNK = 4096
FORMAT_VERSION = 1


class SyntheticConfig(Config):
    """Size and difficulty of the log; the defaults are as hard as real logs are."""

    num_rows: int = Field(default=1_200_000, ge=1, le=1_000_000_000)
    num_users: int = Field(default=10_000, ge=1, le=100_000_000)
    num_items: int = Field(default=1_000, ge=1, le=10_000_000)
    candidates_per_request: int = Field(default=10, ge=1, le=1000)
    history_length: int = Field(default=10, ge=1, le=1000)
    days: int = Field(default=14, ge=1, le=10_000)
    positive_rate: float = Field(default=0.095, gt=0, lt=1)
    valid_share: float = Field(default=0.1, gt=0, lt=0.5)
    test_share: float = Field(default=0.15, gt=0, lt=0.5)
    effects: Effects = Effects()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.num_items < 2 * self.candidates_per_request:
            raise ValueError(f"num_items {self.num_items} must be at least twice candidates_per_request ({self.candidates_per_request})")
        if self.num_requests < 20:
            raise ValueError(f"{self.num_rows} rows make {self.num_requests} requests; at least 20 are needed for the three splits")
        return self

    @property
    def num_requests(self) -> int:
        return self.num_rows // self.candidates_per_request

    def bounds(self) -> dict[str, tuple[int, int]]:
        """Requests first .. last of each split, in time order."""
        n = self.num_requests
        test, valid = max(1, round(n * self.test_share)), max(1, round(n * self.valid_share))
        return {"train": (0, n - test - valid), "valid": (n - test - valid, n - test), "test": (n - test, n)}


@dataclass(frozen=True)
class SplitTruth:
    """What the true probabilities reach on a split: AUC and mean log loss on the labels drawn, and the log loss expected over all draws."""

    bayes_auc: float
    bayes_logloss: float
    expected_logloss: float
    positive_rate: float
    num_rows: int


@dataclass(frozen=True)
class SyntheticTruth:
    """Truth of a generated log, as truth.json holds it."""

    config: SyntheticConfig
    intercept: float
    splits: dict[str, SplitTruth]

    @classmethod
    def load(cls, directory: str | Path) -> "SyntheticTruth":
        """Read `truth.json` of a generated log; raises DataError if it is not one."""
        path = Path(directory) / "truth.json"
        if not path.is_file():
            raise DataError(f"{path}: is not there; `ninerank features synthetic` writes it beside the log")
        data = read_mapping(path)
        try:
            if data["version"] != FORMAT_VERSION:
                raise DataError(f"{path}: version {data['version']!r}; this Ninerank reads version {FORMAT_VERSION}")
            splits = {name: SplitTruth(**split) for name, split in data["splits"].items()}
            return cls(SyntheticConfig.parse(data["config"], str(path)), float(data["intercept"]), splits)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: is not the truth of a synthetic log ({error!r})") from None


def synthetic_spec(config: SyntheticConfig | None = None) -> FeatureSpec:
    """Unfitted spec of the log: ids, a bag of tags, numbers, context and the history."""
    length = (config or SyntheticConfig()).history_length
    features = (
        IdFeature(name="user_id", role="user", dtype="int64", encoding=Vocabulary(min_count=200)),
        IdFeature(name="segment", role="user"),
        IdFeature(name="age", role="user"),
        NumericFeature(name="activity", role="user", transform=Log()),
        SequenceFeature(name="history", role="user", of="item_id", max_length=length),
        SequenceFeature(name="history_category", role="user", of="category", max_length=length),
        IdFeature(name="hour", role="context", dtype="int64"),
        IdFeature(name="device", role="context"),
        IdFeature(name="item_id", role="item", dtype="int64", encoding=Vocabulary(min_count=200)),
        IdFeature(name="department", role="item"),
        IdFeature(name="category", role="item"),
        IdFeature(name="brand", role="item"),
        IdFeature(name="tags", role="item", multi=True),
        NumericFeature(name="price", role="item", transform=Bucketize(num_buckets=20)),
        NumericFeature(name="quality", role="item", transform=Standardise()),
    )
    return FeatureSpec(labels=("click",), group="request_id", features=features)


def generate(config: SyntheticConfig, out_dir: str | Path, *, progress: Callable[[int], None] | None = None) -> SyntheticTruth:
    """Write the log into `out_dir` and return its truth; `progress` is called with each number of rows just written.

    The files are the same, byte for byte, for the same config and library versions. Raises DataError, before any file is written,
    where a split has no clicks or nothing else.
    """
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    world = World(
        num_users=config.num_users,
        num_items=config.num_items,
        num_requests=config.num_requests,
        history_length=config.history_length,
        days=config.days,
        effects=config.effects,
        seed=config.seed,
    )
    candidates, labels = (np.random.default_rng([config.seed, 1, i]) for i in range(2))
    item_RC = world.candidates(candidates, config.num_requests, config.candidates_per_request)
    logit_RC = np.concatenate([world.logit(part, item_RC[part]) for part in _chunks(0, config.num_requests)])
    intercept = _intercept(logit_RC, config.positive_rate)
    probability_RC = _sigmoid(logit_RC + intercept)
    click_RC = labels.random(probability_RC.shape) < probability_RC
    for split, (first, last) in config.bounds().items():
        clicks, count = int(click_RC[first:last].sum()), click_RC[first:last].size
        if not 0 < clicks < count:
            raise DataError(f"split {split!r}: {clicks} clicks in {count} rows leave no AUC to reach; ask for more rows")
    items = _item_table(world)
    _write(directory / "items.parquet", iter([items]))
    splits = {}
    for split, (first, last) in config.bounds().items():
        chunks = (_rows(world, items, part, item_RC[part], click_RC[part]) for part in _chunks(first, last))
        _write(directory / f"{split}.parquet", _counted(chunks, progress))
        p, click = probability_RC[first:last].ravel(), click_RC[first:last].ravel()
        truth = pa.table({"request_id": np.repeat(np.arange(first, last), config.candidates_per_request), "probability": p})
        _write(directory / f"{split}_truth.parquet", iter(truth.to_batches()))
        expected = float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())
        splits[split] = SplitTruth(auc(click, p), logloss(click, p), expected, float(click.mean()), len(p))
    synthetic_spec(config).save(directory / "spec.yaml")
    found = SyntheticTruth(config, intercept, splits)
    with replacing(directory / "truth.json") as temporary:
        document = {
            "version": FORMAT_VERSION,
            "config": config.model_dump(mode="json"),
            "intercept": intercept,
            "splits": {name: asdict(split) for name, split in splits.items()},
        }
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


def _chunks(first: int, last: int) -> Iterator[slice]:
    return (slice(at, min(at + REQUESTS_PER_CHUNK, last)) for at in range(first, last, REQUESTS_PER_CHUNK))


def _counted(batches: Iterator[pa.RecordBatch], progress: Callable[[int], None] | None) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch
        if progress is not None:
            progress(batch.num_rows)


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    first = next(batches)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, first.schema, compression="zstd") as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _intercept(logit: npt.NDArray[np.float64], positive_rate: float) -> float:
    """The intercept that makes the mean probability `positive_rate`, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(logit + middle).mean() < positive_rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _sigmoid(logit: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)))


def _names(prefix: str, codes: npt.NDArray[np.int64]) -> pa.Array:
    """Codes as strings, e.g. category_07."""
    names = pa.array([f"{prefix}_{i:02d}" for i in range(int(codes.max(initial=0)) + 1)])
    return names.take(pa.array(codes))


def _item_table(world: World) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(world.num_tags_I)]), pa.int32())
    tags = world.tags_IM[np.arange(world.tags_IM.shape[1]) < world.num_tags_I[:, None]]
    return pa.record_batch(
        {
            "item_id": world.item_id_I,
            "department": _names("department", world.department_I),
            "category": _names("category", world.category_I),
            "brand": _names("brand", world.brand_I),
            "tags": pa.ListArray.from_arrays(offsets, _names("tag", tags)),
            "price": pa.array(world.price_I, mask=~world.price_known_I),
            "quality": world.quality_I,
        }
    )


def _rows(
    world: World, items: pa.RecordBatch, part: slice, item_RC: npt.NDArray[np.int64], click_RC: npt.NDArray[np.bool_]
) -> pa.RecordBatch:
    requests, count, per = world.requests, *item_RC.shape
    user = requests.user_R[part]
    history, there = world.history(part)
    offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(1))]), pa.int32())
    ages = _names("age", np.arange(int(world.age_U.max(initial=0)) + 1)).take(pa.array(world.age_U[user], mask=~world.age_known_U[user]))
    time = requests.time_ms_R[part]
    by_request = pa.record_batch(
        {
            "request_id": np.arange(part.start, part.stop),
            "timestamp": pa.array(time, pa.timestamp("ms", tz="UTC")),
            "user_id": world.user_id_U[user],
            "segment": _names("segment", world.segment_U[user]),
            "age": ages,
            "activity": world.activity_U[user],
            "history": pa.ListArray.from_arrays(offsets, pa.array(world.item_id_I[history[there]])),
            "history_category": pa.ListArray.from_arrays(offsets, _names("category", world.category_I).take(pa.array(history[there]))),
            "hour": hour_of(time),
            "device": pa.array(["phone", "desktop", "tablet"]).take(pa.array(requests.device_R[part])),
        }
    )
    wide = by_request.take(pa.array(np.repeat(np.arange(count), per)))
    narrow = items.take(pa.array(item_RC.ravel()))
    click = pa.array(click_RC.ravel().astype(np.int8))
    return pa.RecordBatch.from_arrays(
        [*wide.columns[:2], click, *wide.columns[2:], *narrow.columns],
        names=[*wide.schema.names[:2], "click", *wide.schema.names[2:], *narrow.schema.names],
    )
