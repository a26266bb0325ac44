"""A log that the predictor served over the synthetic source: parity, the metrics of the raw data, and planted skew found and named.

The server's item table is wrong on purpose in some rows; the snapshot that features are held against is the source's own.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.features.sources.synthetic import SyntheticConfig, generate, synthetic_spec
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.training.recipe import Recipe
from ninerank.training.run import load_run
from ninerank.training.trainer import Trainer

NUM_REQUESTS = 60
LATER_US = 4_000_000_000_000_000  # in the year 2096: after every request


@dataclass(frozen=True)
class Served:
    """Logs of the same requests, served over right and over skewed item tables."""

    bundle: Path
    test: pa.Table
    items: Path
    labels: Path
    right: Path
    skewed: Path
    shifted_item: int
    absent_item: int
    leaked_item: int


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    out = tmp_path_factory.mktemp("synthetic")
    config = SyntheticConfig(num_rows=8_000, num_users=300, num_items=60, seed=3)
    generate(config, out / "log")
    recipe = {
        "data": {"dir": str(out / "log"), "train": "train.parquet", "valid": "valid.parquet", "test": "test.parquet", "batch_size": 512},
        "spec": synthetic_spec(config).model_dump(mode="json"),
        "model": {"name": "deepfm", "embedding_dim": 8, "mlp": {"hidden": [32]}},
        "schedule": {"epochs": 1},
        "optimizer": {"lr": 0.01},
        "device": "cpu",
    }
    Trainer(Recipe.parse(recipe, "recipe"), out / "run").fit()
    run = load_run(out / "run")
    golden = pq.read_table(out / "log" / "valid.parquet").slice(0, 16).combine_chunks().to_batches()[0]
    export_bundle(run.model, run.spec, golden, out / "bundle", model_name="ctr", version="1")

    table = pq.read_table(out / "log" / "test.parquet")
    requests = pc.unique(table["request_id"]).slice(0, NUM_REQUESTS)
    test = table.filter(pc.is_in(table["request_id"], requests))
    shown = pc.value_counts(test["item_id"].combine_chunks()).sort(order="descending", by="counts").field("values").to_pylist()
    shifted, absent, leaked = shown[:3]

    items = pq.read_table(out / "log" / "items.parquet")
    right_rows = items.to_pylist()
    skewed_rows = [dict(row) for row in right_rows if row["item_id"] != absent]
    for row in skewed_rows:
        if row["item_id"] == shifted:
            row["price"] = 50.0 * (row["price"] or 1.0)
        elif row["item_id"] == leaked:
            row["quality"] = 9.75
    for name, rows in (("right", right_rows), ("skewed", skewed_rows)):
        pq.write_table(pa.Table.from_pylist(rows, items.schema), out / f"{name}.parquet")
    versions = [{**row, "valid_from": 0} for row in right_rows]
    versions += [{**row, "quality": 9.75, "valid_from": LATER_US} for row in right_rows if row["item_id"] == leaked]
    schema = items.schema.append(pa.field("valid_from", pa.int64()))
    pq.write_table(pa.Table.from_pylist(versions, schema), out / "versions.parquet")
    labels = [(str(row["request_id"]), str(row["item_id"]), row["click"]) for row in test.to_pylist()]
    names = ("request_id", "candidate_id", "click")
    pq.write_table(pa.table(dict(zip(names, zip(*labels, strict=True), strict=True))), out / "labels.parquet")
    for name in ("right", "skewed"):
        serve(out / "bundle", out / f"{name}.parquet", test, out / f"{name}_log")
    paths = (out / "versions.parquet", out / "labels.parquet", out / "right_log", out / "skewed_log")
    return Served(out / "bundle", test, *paths, shifted, absent, leaked)


def serve(bundle: Path, items: Path, test: pa.Table, log: Path) -> None:
    """Ask a real server for every request of the table, candidates by id."""
    server = PredictorServer(bundle, ServeConfig(port=0, device="cpu", items=items, log_dir=log))
    ports = server.start()
    columns = server.engine.schema.request.names
    try:
        with PredictorClient(f"127.0.0.1:{ports.port}") as client:
            for request in pc.unique(test["request_id"]).to_pylist():
                rows = test.filter(pc.equal(test["request_id"], request))
                user = {name: rows[name][0].as_py() for name in columns}
                client.rank(user, ids=rows["item_id"].combine_chunks(), request_id=str(request))
    finally:
        server.stop(5)


def replayed(*arguments: object) -> tuple[int, dict[str, object]]:
    result = CliRunner().invoke(build("replay"), ["replay", *map(str, arguments), "--device", "cpu", "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, json.loads(result.stdout)


def snapshots(served: Served) -> tuple[object, ...]:
    return ("--item-snapshot", served.items, "--item-key", "item_id", "--snapshot-time", "valid_from")


def test_the_served_log_replays_and_measures_as_the_raw_data(served: Served) -> None:
    code, found = replayed(served.right, "--bundle", served.bundle, "--labels", served.labels, *snapshots(served))
    assert code == 0
    assert found["passed"]
    assert found["requests"] == NUM_REQUESTS
    assert found["candidates"] == len(served.test)
    assert found["largest_difference"] <= 1e-6  # type: ignore[operator]
    assert found["labels"] == {"rows": 600, "duplicates": 0, "labelled": 600, "unlabelled": 0, "orphans": 0}

    from ninerank.predictor.engine import Engine

    rows = served.test.combine_chunks().to_batches()[0]
    score, click = Engine.load(served.bundle, "cpu").score(rows)[:, 0].astype(np.float64), served.test["click"].to_numpy()
    quality = found["quality"]["click"]["again"]  # type: ignore[index]
    assert quality["auc"] == pytest.approx(roc_auc_score(click, score), abs=1e-6)
    assert quality["logloss"] == pytest.approx(log_loss(click, score), abs=1e-6)
    assert quality["pcoc"] == pytest.approx(score.sum() / click.sum(), abs=1e-6)


def test_shifted_features_cache_defaults_and_leaks_are_each_found_and_named(served: Served) -> None:
    code, found = replayed(served.skewed, "--bundle", served.bundle, *snapshots(served))
    assert code == 1
    assert found["largest_difference"] <= 1e-6, "scores follow from the features that were used"  # type: ignore[operator]
    columns = found["skew"]["columns"]  # type: ignore[index]

    def shown(item: int) -> int:
        return int(pc.sum(pc.equal(served.test["item_id"], item)).as_py())

    assert columns["price"]["shifted"] == shown(served.shifted_item)
    assert columns["quality"]["future"] == shown(served.leaked_item)
    assert columns["quality"]["examples"]["future"]["valid_from_us"] == LATER_US
    assert columns["category"]["defaulted"] == columns["brand"]["defaulted"] == shown(served.absent_item)
    assert (columns["price"]["future"], columns["quality"]["shifted"], columns["item_id"]["shifted"]) == (0, 0, 0)
    assert columns["price"]["blamed"] > 0
    assert columns["quality"]["blamed"] > 0
    assert columns["item_id"]["blamed"] == 0
    failed = {check["name"] for check in found["checks"] if not check["passed"]}  # type: ignore[attr-defined]
    assert failed >= {"shifted values of price", "future values of quality", "defaulted values of category"}


def test_what_is_printed_names_the_columns(served: Served, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = [served.skewed, "--bundle", served.bundle, *snapshots(served), "--device", "cpu", "--report", page]
    result = CliRunner().invoke(build("replay"), ["replay", *map(str, arguments)])
    assert result.exit_code == 1
    for text in ("shifted values of price", "future values of quality", "FAIL"):
        assert text in result.stdout
        assert text in page.read_text(encoding="utf-8")
