"""The synthetic log: one seed one log, columns as its spec says, and a truth that is the truth of the rows written."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ninerank.errors import DataError, SpecError
from ninerank.features.fit import fit
from ninerank.features.reader import Reader
from ninerank.features.sources.synthetic import SPLITS, SyntheticConfig, SyntheticTruth, generate, synthetic_spec
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.files import sha256
from ninerank.metrics import auc, logloss

SMALL = SyntheticConfig(num_rows=6_000, num_users=300, num_items=200, history_length=6, seed=5)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "log"
    generate(SMALL, directory)
    return directory


@pytest.fixture(scope="module")
def as_hard_as_real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SyntheticTruth]:
    """The default log, with fewer rows."""
    directory = tmp_path_factory.mktemp("default") / "log"
    return directory, generate(SyntheticConfig(num_rows=200_000), directory)


def table(directory: Path, name: str) -> pa.Table:
    return pq.read_table(directory / f"{name}.parquet")


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(directory.iterdir())}


def test_one_seed_gives_the_same_bytes_and_another_gives_another_log(log: Path, tmp_path: Path) -> None:
    generate(SMALL, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(log)
    generate(SMALL.model_copy(update={"seed": 6}), tmp_path / "other")
    assert digests(tmp_path / "other")["train.parquet"] != digests(log)["train.parquet"]


def test_the_files(log: Path) -> None:
    truths = [f"{split}_truth.parquet" for split in SPLITS]
    assert set(digests(log)) == {*(f"{split}.parquet" for split in SPLITS), *truths, "items.parquet", "spec.yaml", "truth.json"}


def test_the_spec_reads_every_split_and_can_be_fitted(log: Path) -> None:
    spec = FeatureSpec.load(log / "spec.yaml")
    assert spec == synthetic_spec(SMALL)
    assert not spec.is_fitted
    fitted = fit(spec, Reader(log / "train.parquet", spec=spec).epoch())
    transform, rows = Transform(fitted), 0
    for split in SPLITS:
        assert {*spec.columns(), *spec.labels, spec.group} <= set(table(log, split).column_names)
        for batch in Reader(log / f"{split}.parquet", spec=spec).epoch():
            encoded = transform.batch(batch, labels=True)
            rows += encoded.num_rows
    assert rows == SMALL.num_rows


@pytest.mark.parametrize("split", SPLITS)
def test_the_bayes_figures_are_those_of_the_truth_beside_the_rows(log: Path, split: str) -> None:
    found = SyntheticTruth.load(log).splits[split]
    rows, truth = table(log, split), table(log, f"{split}_truth")
    assert truth["request_id"].equals(rows["request_id"])
    click, p = rows["click"].to_numpy(), truth["probability"].to_numpy()
    assert ((p > 0) & (p < 1)).all()
    assert found.bayes_auc == auc(click, p)
    assert found.bayes_logloss == logloss(click, p)
    assert found.positive_rate == click.mean()
    assert found.num_rows == len(click)


def test_truth_json_comes_back_as_it_was(log: Path, tmp_path: Path) -> None:
    truth = generate(SMALL, tmp_path)
    assert SyntheticTruth.load(tmp_path) == truth == SyntheticTruth.load(log)
    document = json.loads((tmp_path / "truth.json").read_text())
    assert document["splits"] == {name: asdict(split) for name, split in truth.splits.items()}


def test_requests_are_in_time_order_and_splits_follow_each_other(log: Path) -> None:
    times, requests = [], []
    for split in SPLITS:
        rows = table(log, split)
        times += rows["timestamp"].cast(pa.int64()).to_pylist()
        requests += rows["request_id"].to_pylist()
    assert times == sorted(times)
    assert requests == [n // SMALL.candidates_per_request for n in range(SMALL.num_rows)]


def test_candidates_of_a_request_are_distinct_and_share_its_columns(log: Path) -> None:
    rows = table(log, "train")
    per = SMALL.candidates_per_request
    item_RC = rows["item_id"].to_numpy().reshape(-1, per)
    assert all(len(set(row)) == per for row in item_RC.tolist())
    for column in synthetic_spec(SMALL).columns("request"):
        values = rows[column].to_pylist()
        assert all(values[n] == values[n - n % per] for n in range(len(values))), column


def test_rows_show_items_as_the_item_file_has_them(log: Path) -> None:
    items = {row["item_id"]: row for row in table(log, "items").to_pylist()}
    assert len(items) == SMALL.num_items
    for row in table(log, "test").to_pylist():
        assert {key: row[key] for key in items[row["item_id"]]} == items[row["item_id"]]


def test_a_history_is_bounded_holds_items_and_their_categories(log: Path) -> None:
    category = dict(zip(*(table(log, "items")[name].to_pylist() for name in ("item_id", "category")), strict=True))
    lengths = set()
    for row in table(log, "train").select(["history", "history_category"]).to_pylist():
        lengths.add(len(row["history"]))
        assert [category[item] for item in row["history"]] == row["history_category"]
    assert max(lengths) == SMALL.history_length
    assert len(lengths) > 2


def test_some_values_are_missing(log: Path) -> None:
    assert table(log, "items")["price"].null_count > 0
    assert table(log, "train")["age"].null_count > 0
    assert pc.min(pc.list_value_length(table(log, "items")["tags"])).as_py() == 0


def test_the_defaults_are_as_hard_as_real_logs(as_hard_as_real: tuple[Path, SyntheticTruth]) -> None:
    _, truth = as_hard_as_real
    for split in truth.splits.values():
        assert 0.75 <= split.bayes_auc <= 0.85
        assert 0.02 <= split.positive_rate <= 0.10
        assert split.bayes_logloss == pytest.approx(split.expected_logloss, rel=0.05)
    assert truth.splits["train"].positive_rate == pytest.approx(truth.config.positive_rate, rel=0.05)


def test_ids_have_a_long_tail(as_hard_as_real: tuple[Path, SyntheticTruth]) -> None:
    rows = table(as_hard_as_real[0], "train")
    for column in ("user_id", "item_id"):
        counts = np.sort(np.unique(rows[column].to_numpy(), return_counts=True)[1])[::-1]
        head = max(1, len(counts) // 100)
        assert counts[:head].sum() > 5 * head * counts.mean(), column


def test_probabilities_are_calibrated_to_the_clicks(as_hard_as_real: tuple[Path, SyntheticTruth]) -> None:
    directory, _ = as_hard_as_real
    click, p = table(directory, "train")["click"].to_numpy(), table(directory, "train_truth")["probability"].to_numpy()
    for part in np.array_split(np.argsort(p), 10):
        deviation = np.sqrt((p[part] * (1 - p[part])).sum())
        assert abs(click[part].sum() - p[part].sum()) < 5 * deviation


def test_progress_counts_every_row(tmp_path: Path) -> None:
    seen: list[int] = []
    generate(SMALL, tmp_path, progress=seen.append)
    assert sum(seen) == SMALL.num_rows


@pytest.mark.parametrize("smallest", [{"num_users": 1}, {"num_items": 2, "candidates_per_request": 1}, {"history_length": 1}])
def test_small_worlds_can_be_drawn(smallest: dict[str, Any], tmp_path: Path) -> None:
    config = SyntheticConfig(**{"num_rows": 400, "positive_rate": 0.4, "num_users": 10, "num_items": 30, **smallest})
    truth = generate(config, tmp_path)
    assert sum(split.num_rows for split in truth.splits.values()) == config.num_rows


def test_a_split_without_clicks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split 'train': 0 clicks in 300 rows"):
        generate(SyntheticConfig(num_rows=400, num_users=10, num_items=30, positive_rate=1e-6), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_items": 10}, "num_items 10 must be at least twice candidates_per_request"),
        ({"num_rows": 100}, "at least 20 are needed"),
        ({"num_row": 100}, "unknown key 'num_row'; did you mean 'num_rows'"),
        ({"positive_rate": 0}, "positive_rate"),
        ({"effects": {"histroy": 1.0}}, "unknown key 'histroy'; did you mean 'history'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        SyntheticConfig.parse(settings, "synthetic")


def test_a_truth_that_is_none_is_refused(log: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="truth.json: is not there"):
        SyntheticTruth.load(tmp_path)
    document = json.loads((log / "truth.json").read_text())
    (tmp_path / "truth.json").write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(DataError, match="version 99; this Ninerank reads version 1"):
        SyntheticTruth.load(tmp_path)
    (tmp_path / "truth.json").write_text(json.dumps({key: document[key] for key in ("version", "config", "splits")}))
    with pytest.raises(DataError, match="is not the truth of a synthetic log"):
        SyntheticTruth.load(tmp_path)
