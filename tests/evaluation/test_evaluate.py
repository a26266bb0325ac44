"""`evaluate` on real files: a run and its bundle, whole and by slice, through the command line."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.errors import CheckpointError, DataError, NinerankError
from ninerank.evaluation.evaluate import Evaluation, evaluate
from ninerank.evaluation.report import evaluation_page
from ninerank.evaluation.scorer import ModelInfo, Scorer, open_scorer
from ninerank.features.reader import Reader
from ninerank.features.spec import FeatureSpec
from ninerank.metrics import gauc
from ninerank.training.run import Run


def command(*arguments: object) -> tuple[int, str]:
    """Run `ninerank evaluate ...`: exit code and what was printed."""
    result = CliRunner().invoke(build("evaluate"), ["evaluate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output if result.exit_code == 2 else result.stdout


def evaluate_files(scorer: Scorer, *paths: Path, slices: tuple[str, ...] = (), batch_size: int = 400) -> Evaluation:
    reader = Reader(paths, spec=scorer.spec, batch_size=batch_size, extra_columns=slices)
    return evaluate(scorer, reader.epoch(), data=[str(path) for path in paths], slices=slices)


def test_a_run_gets_the_metrics_that_its_training_reported(run: Run, log_dir: Path) -> None:
    (task,) = evaluate_files(open_scorer(run.directory, "cpu"), log_dir / "test.parquet").tasks
    for name in ("auc", "gauc", "logloss", "pcoc"):
        assert task.summary.as_dict()[name] == pytest.approx(run.metrics["test"][name], abs=1e-7)
    assert task.label == "click"
    assert task.summary.rows == 1500
    assert task.summary.auc > 0.7


def test_a_bundle_gets_the_metrics_of_its_run(run: Run, bundle_dir: Path, log_dir: Path) -> None:
    by_run = evaluate_files(open_scorer(run.directory, "cpu"), log_dir / "test.parquet")
    by_bundle = evaluate_files(open_scorer(bundle_dir, "cpu"), log_dir / "test.parquet", batch_size=77)
    assert by_bundle.model.kind == "bundle"
    assert by_bundle.model.spec_digest == by_run.model.spec_digest == run.spec.digest
    ours, theirs = by_bundle.tasks[0].summary.as_dict(), by_run.tasks[0].summary.as_dict()
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_slices_equal_metrics_of_the_rows_that_they_hold(bundle_dir: Path, log_dir: Path) -> None:
    scorer = open_scorer(bundle_dir, "cpu")
    (task,) = evaluate_files(scorer, log_dir / "test.parquet", slices=("device", "price")).tasks
    rows = pq.read_table(log_dir / "test.parquet").combine_chunks().to_batches()[0]
    score, label = scorer.score(rows)[:, 0], rows.column("click").to_numpy()
    devices = np.array([value or "(missing)" for value in rows.column("device").to_pylist()])
    assert set(task.slices["device"]) == {"phone", "desk", "tv", "(missing)"}
    assert list(task.slices["device"])[-1] == "(missing)"
    for value, found in task.slices["device"].items():
        own = devices == value
        assert found.rows == own.sum()
        assert found.auc == pytest.approx(roc_auc_score(label[own], score[own]), abs=1e-6)
        assert found.logloss == pytest.approx(log_loss(label[own], score[own].astype(float)), abs=1e-6)
    ranges = task.slices["price"]
    assert len(ranges) == 10
    assert sum(found.rows for found in ranges.values()) == 1500
    assert all(found.rows == 150 for found in ranges.values())


def test_command_prints_a_table_and_writes_json_and_a_page(run: Run, log_dir: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "deep" / "result.json", tmp_path / "report.html"
    code, text = command(run.directory, log_dir / "test.parquet", "--slice", "device", "--out", out, "--report", report, "--device", "cpu")
    assert code == 0
    assert "AUC" in text
    assert "phone" in text
    assert str(report) in text
    found = json.loads(out.read_text())
    assert found["rows"] == 1500
    assert found["tasks"]["click"]["auc"] == pytest.approx(run.metrics["test"]["auc"], abs=1e-7)
    assert found["tasks"]["click"]["slices"]["device"]["tv"]["rows"] > 0
    assert found["model"]["spec_digest"] == run.spec.digest
    assert report.read_text().count("<svg") == 3


def test_command_prints_json_alone(bundle_dir: Path, log_dir: Path) -> None:
    code, text = command(bundle_dir, log_dir / "test.parquet", log_dir / "valid.parquet", "--json", "--device", "cpu")
    assert code == 0
    found = json.loads(text)
    assert found["rows"] == 2300
    assert found["data"] == [str(log_dir / "test.parquet"), str(log_dir / "valid.parquet")]


def test_csv_gives_the_metrics_of_parquet(bundle_dir: Path, log_dir: Path, tmp_path: Path) -> None:
    rows = pq.read_table(log_dir / "test.parquet")
    pa_csv.write_csv(rows, tmp_path / "test.csv")
    scorer = open_scorer(bundle_dir, "cpu")
    by_csv, by_parquet = (evaluate_files(scorer, path).tasks[0].summary for path in (tmp_path / "test.csv", log_dir / "test.parquet"))
    assert by_csv.as_dict() == pytest.approx(by_parquet.as_dict(), abs=1e-9)


def test_rows_of_one_class_have_no_auc_and_still_a_page(bundle_dir: Path, log_dir: Path, tmp_path: Path) -> None:
    rows = pq.read_table(log_dir / "test.parquet")
    pq.write_table(rows.filter(pa.compute.equal(rows["click"], 0)), tmp_path / "negatives.parquet")
    code, text = command(bundle_dir, tmp_path / "negatives.parquet", "--json", "--device", "cpu", "--report", tmp_path / "page.html")
    assert code == 0
    found = json.loads(text)["tasks"]["click"]
    assert found["auc"] is None
    assert found["pcoc"] is None
    assert math.isfinite(found["logloss"])
    assert "there is no ranking to judge" in (tmp_path / "page.html").read_text()


def test_places_that_cannot_be_written_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{tmp_path}: is a directory"):
        command(tmp_path / "no_model", tmp_path / "no_data", "--out", tmp_path)
    with pytest.raises(DataError, match=r"deep/page.html: cannot be written, .*file is no directory"):
        command(tmp_path / "no_model", tmp_path / "no_data", "--report", tmp_path / "file" / "deep" / "page.html")


def write(path: Path, **changes: pa.Array | None) -> Path:
    """test rows with columns replaced, or left out where None is given."""
    rows = {"click": [0, 1], "user": ["a", "b"], "hour": [1, 2], "item": ["i1", "i2"], "price": [1.0, 2.0], **changes}
    pq.write_table(pa.table({name: value for name, value in rows.items() if value is not None}), path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"click": None}, "column 'click' is missing"),
        ({"click": [0, 2]}, r"click.*2"),
        ({"click": [0, None]}, r"column 'click', row 1"),
        ({"user": None}, "column 'user' is missing"),
        ({"price": [1.0, math.inf]}, r"price.*inf"),
        ({"hour": ["x", "y"]}, "hour"),
        ({"click": []}, "no rows|lengths"),
    ],
)
def test_bad_rows_are_refused_with_the_column(bundle_dir: Path, tmp_path: Path, changes: dict[str, list[object]], message: str) -> None:
    if changes.get("click") == []:
        changes = {name: pa.array([], kind) for name, kind in (("click", pa.int64()), ("user", pa.string()), ("hour", pa.int64()))}
        changes |= {"item": pa.array([], pa.string()), "price": pa.array([], pa.float64())}
    path = write(tmp_path / "bad.parquet", **changes)
    with pytest.raises(DataError, match=message):
        command(bundle_dir, path, "--device", "cpu")


def test_what_is_neither_run_nor_bundle_is_refused(run: Run, log_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no recipe.yaml and no manifest.json; a run .* or a bundle"):
        open_scorer(tmp_path)
    with pytest.raises(DataError, match="is no directory"):
        open_scorer(tmp_path / "gone")
    (tmp_path / "recipe.yaml").write_bytes((run.directory / "recipe.yaml").read_bytes())
    with pytest.raises(CheckpointError, match=r"spec.json is missing"):
        open_scorer(tmp_path)
    with pytest.raises(NinerankError, match="columm"):
        command(run.directory, log_dir / "test.parquet", "--slice", "columm", "--device", "cpu")
    with pytest.raises(DataError, match=r"gone.parquet: is not there"):
        command(run.directory, log_dir / "gone.parquet", "--device", "cpu")


class ColumnScorer(Scorer):
    """Takes its scores from columns of the data: two tasks, weights, whole numbers as groups."""

    def __init__(self) -> None:
        feature = {"name": "item", "kind": "id", "role": "item", "encoding": {"kind": "hashed", "num_buckets": 5}}
        labels = ["click", "buy"]
        self.spec = FeatureSpec.parse({"labels": labels, "weight": "weight", "group": "query", "features": [feature]}, "spec")
        self.info = ModelInfo("here", "run", "columns", "1", self.spec.digest, "cpu")

    def score(self, rows: pa.RecordBatch) -> np.ndarray:
        return np.stack([rows.column("p_click").to_numpy(), rows.column("p_buy").to_numpy()], axis=1).astype(np.float32)


def test_every_task_is_measured_with_weights_and_groups(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    chance = rng.random((500, 2)).astype(np.float32)
    columns = {
        "click": (rng.random(500) < chance[:, 0]).astype(int),
        "buy": (rng.random(500) < chance[:, 1]).astype(int),
        "weight": rng.integers(0, 3, 500),
        "query": rng.integers(0, 40, 500),
        "item": rng.integers(0, 9, 500),
        "p_click": chance[:, 0],
        "p_buy": chance[:, 1],
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    found = evaluate_files(ColumnScorer(), tmp_path / "log.parquet", slices=("item", "p_click", "p_buy"))
    assert [task.label for task in found.tasks] == ["click", "buy"]
    for place, task in enumerate(found.tasks):
        label, weight = columns[task.label], columns["weight"]
        assert task.summary.auc == pytest.approx(roc_auc_score(label, chance[:, place], sample_weight=weight), abs=1e-9)
        assert task.summary.gauc == pytest.approx(gauc(label, chance[:, place], weight, group_N=columns["query"]), abs=1e-9)
        assert task.summary.weight == weight.sum()
        assert set(task.slices["item"]) == {str(item) for item in range(9)}
    page = evaluation_page(found)
    assert page.count("<svg") == 6
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["tasks"].keys() == {"click", "buy"}
