"""Dynamic tables all the way: trained, exported, served to ids nobody has seen, and replayed from the log."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.evaluation.layers import compare_bundle
from ninerank.evaluation.place import Place
from ninerank.evaluation.replay import replay
from ninerank.evaluation.replayer import BundleReplayer
from ninerank.evaluation.scorer import open_scorer
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import read_log
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.training.recipe import Recipe
from ninerank.training.run import Run, load_run
from ninerank.training.trainer import Trainer

SPEC = {
    "labels": ["click"],
    "features": [
        {"name": "user", "kind": "id", "role": "user", "encoding": {"kind": "dynamic", "seed": 3}},
        {"name": "hour", "kind": "id", "role": "context", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 24}},
        {"name": "item", "kind": "id", "role": "item", "encoding": {"kind": "dynamic"}},
        {"name": "price", "kind": "numeric", "role": "item", "transform": {"kind": "log"}},
    ],
}


@pytest.fixture(scope="module")
def dynamic_run(log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose user table takes in ids from their third appearance on."""
    recipe = {
        "data": {"dir": str(log_dir), "train": "train.parquet", "valid": "valid.parquet", "test": "test.parquet", "batch_size": 200},
        "spec": SPEC,
        "model": {"name": "deepfm", "embedding_dim": 4, "mlp": {"hidden": [16]}},
        "embedding": {"mode": "sparse", "tables": {"user": {"admission": {"kind": "frequency", "threshold": 3}}}},
        "schedule": {"epochs": 2},
        "seed": 3,
        "device": "cpu",
    }
    out = tmp_path_factory.mktemp("dynamic") / "run"
    Trainer(Recipe.parse(recipe, "recipe"), out).fit()
    return load_run(out)


@pytest.fixture(scope="module")
def dynamic_bundle(dynamic_run: Run, log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dynamic") / "bundle"
    golden = pq.read_table(log_dir / "valid.parquet").slice(0, 64).combine_chunks().to_batches()[0]
    export_bundle(dynamic_run.model, dynamic_run.spec, golden, out, model_name="dynamic", version="1")
    return out


@pytest.fixture(scope="module")
def served(dynamic_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PredictorServer, str, Path]]:
    """A server, its address, and the directory of its log."""
    log = tmp_path_factory.mktemp("dynamic") / "log"
    server = PredictorServer(dynamic_bundle, ServeConfig(port=0, device="cpu", log_dir=log))
    try:
        yield server, f"127.0.0.1:{server.start().port}", log
    finally:
        server.stop(0)


def test_the_bundle_scores_as_the_run(dynamic_run: Run, dynamic_bundle: Path, log_dir: Path) -> None:
    rows = pq.read_table(log_dir / "test.parquet").combine_chunks().to_batches()[0]
    engine = Engine.load(dynamic_bundle, "cpu")
    assert np.abs(engine.score(rows) - open_scorer(dynamic_run.directory, "cpu").score(rows)).max() <= 1e-6
    assert engine.manifest.dynamic["item"] == 30
    assert 0 < engine.manifest.dynamic["user"] <= 60


def test_two_places_agree_on_rows_of_dynamic_tables(dynamic_bundle: Path) -> None:
    found = compare_bundle(Bundle.load(dynamic_bundle), (Place.parse("cpu"), Place.parse("cpu:torch")))
    assert found.passed, found.verdict
    assert found.kernels[0].keys() == {"embedding_rows: numba", "embedding_bag: numba"}
    assert found.kernels[1].keys() == {"embedding_rows: torch", "embedding_bag: torch"}


def test_unknown_ids_are_ranked_and_replayed(served: tuple[PredictorServer, str, Path], dynamic_bundle: Path) -> None:
    server, target, log = served
    items = {"item": ["i1", "never seen", None, "i29", "never seen either"], "price": [1.0, 2.0, 2.0, 3.0, 2.0]}
    asked = json.dumps({"user": {"user": "a stranger", "hour": 5}, "items": items, "ids": [10, 11, 12, 13, 14], "request_id": "cli"})
    done = CliRunner().invoke(build("rank"), ["rank", "--target", target, "--request", "-", "--json"], input=asked)
    assert done.exit_code == 0, done.output
    score = {one["id"]: one["score"] for one in json.loads(done.stdout)["ranked"]}
    assert score[11] == score[12] == score[14]
    assert len({score[10], score[11], score[13]}) == 3
    with PredictorClient(target) as client:
        for n in range(20):
            client.rank({"user": f"u{4 * n}", "hour": n}, {"item": [f"i{n}", f"x{n}"], "price": [1.5, 1.5]}, request_id=f"r{n}")
    assert server.log is not None
    server.log.close()
    found = replay(read_log(log), BundleReplayer.load(dynamic_bundle, "cpu"), log="log")
    assert found.passed
    assert (found.parity.num_requests, found.parity.num_candidates) == (21, 45)
    assert found.parity.largest <= 1e-6
