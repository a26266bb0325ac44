"""Replay of a log that a real server wrote: by the bundle, by the server itself, and by a model that answers otherwise."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.errors import DataError, NinerankError
from ninerank.evaluation.joined import Labels
from ninerank.evaluation.replay import count_requests, replay
from ninerank.evaluation.replayer import BundleReplayer, EndpointReplayer
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.requestlog import RequestLog, read_log
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.towers.registry import build_model
from ninerank.training.run import Run

NUM_REQUESTS = 60


@dataclass(frozen=True)
class Served:
    """A log of requests, what the client was told, and the labels of every candidate."""

    log: Path
    target: str
    scores: dict[str, np.ndarray]
    labels: Path


@pytest.fixture(scope="module")
def served(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    out = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(5)
    server = PredictorServer(bundle_dir, ServeConfig(port=0, device="cpu", log_dir=out / "log"))
    ports = server.start()
    target = f"127.0.0.1:{ports.port}"
    scores, rows = {}, []
    try:
        with PredictorClient(target) as client:
            for n in range(NUM_REQUESTS):
                count = int(rng.integers(1, 20))
                user = {"user": f"u{rng.integers(0, 60)}", "hour": int(rng.integers(0, 24)) if n % 5 else None}
                ids = [f"i{item}" for item in rng.integers(0, 30, count)]
                items = {"item": ids, "price": [None if rng.random() < 0.1 else price for price in rng.lognormal(1, 1, count)]}
                result = client.rank(user, items, ids=[f"c{place}" for place in range(count)], request_id=f"r{n}")
                scores[result.request_id] = result.scores
                rows += [(f"r{n}", f"c{place}", int(rng.random() < score)) for place, score in enumerate(result.scores)]
        assert server.log is not None
        server.log.close()
        pq.write_table(
            pa.table(dict(zip(("request_id", "candidate_id", "label"), zip(*rows, strict=True), strict=True))), out / "labels.parquet"
        )
        yield Served(out / "log", target, scores, out / "labels.parquet")
    finally:
        server.stop(0)


@pytest.fixture(scope="module")
def other_bundle(run: Run, log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same spec with other weights."""
    model = build_model(run.recipe.model, run.spec, run.recipe.embedding, seed=99)
    golden = pq.read_table(log_dir / "test.parquet").slice(0, 8).combine_chunks().to_batches()[0]
    out = tmp_path_factory.mktemp("bundles") / "other"
    export_bundle(model.eval(), run.spec, golden, out, model_name="small", version="4")
    return out


def command(*arguments: object) -> tuple[int, str]:
    """Run `ninerank replay ...`: exit code and what was printed."""
    result = CliRunner().invoke(build("replay"), ["replay", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output if result.exit_code == 2 else result.stdout


def test_the_log_holds_what_the_client_was_told(served: Served) -> None:
    logged = {request.request_id: request.scores_NT[:, 0] for request in read_log(served.log)}
    assert logged.keys() == served.scores.keys()
    for request_id, scores in served.scores.items():
        np.testing.assert_array_equal(logged[request_id], scores)
    assert count_requests(served.log) == NUM_REQUESTS


def test_a_bundle_gives_the_served_scores_again(served: Served, bundle_dir: Path) -> None:
    found = replay(read_log(served.log), BundleReplayer.load(bundle_dir, "cpu"), log="log")
    assert found.passed
    assert found.parity.num_requests == NUM_REQUESTS
    assert found.parity.num_candidates == sum(len(scores) for scores in served.scores.values())
    assert found.parity.largest <= 1e-6
    assert found.parity.num_flipped == 0
    assert found.served == found.answered == {("small", "3"): NUM_REQUESTS}
    assert found.again == {}


def test_the_endpoint_gives_the_served_scores_again(served: Served) -> None:
    with EndpointReplayer(served.target) as replayer:
        found = replay(read_log(served.log), replayer, log="log", labels=Labels(served.labels))
    assert found.passed
    assert found.kind == "endpoint"
    assert found.answered == {("small", "3"): NUM_REQUESTS}
    assert found.again["label"].summary().rows == found.parity.num_candidates


def test_labels_give_the_metrics_of_the_joined_rows(served: Served, bundle_dir: Path) -> None:
    found = replay(read_log(served.log), BundleReplayer.load(bundle_dir, "cpu"), labels=Labels(served.labels, ["click"]))
    labels = {(row["request_id"], row["candidate_id"]): row["label"] for row in pq.read_table(served.labels).to_pylist()}
    label = [labels[request_id, f"c{place}"] for request_id, scores in served.scores.items() for place in range(len(scores))]
    score = np.concatenate(list(served.scores.values()))
    summary = found.logged["click"].summary()
    assert summary.auc == pytest.approx(roc_auc_score(label, score), abs=1e-9)
    assert summary.logloss == pytest.approx(log_loss(label, score.astype(float)), abs=1e-9)
    assert found.again["click"].summary().auc == pytest.approx(summary.auc, abs=1e-3)
    assert summary.gauc is not None
    assert found.joined is not None
    assert found.joined.as_dict() == {"rows": len(label), "duplicates": 0, "labelled": len(label), "unlabelled": 0, "orphans": 0}


def test_clicks_alone_count_the_rest_as_zero(served: Served, bundle_dir: Path, tmp_path: Path) -> None:
    rows = pq.read_table(served.labels)
    pq.write_table(rows.filter(pa.compute.equal(rows["label"], 1)), tmp_path / "clicks.parquet")
    outputs = {}
    for name, path, unlabelled in (("all", served.labels, "skip"), ("clicks", tmp_path / "clicks.parquet", "zero")):
        code, text = command(served.log, "--bundle", bundle_dir, "--labels", path, "--unlabelled", unlabelled, "--json", "--device", "cpu")
        assert code == 0
        outputs[name] = json.loads(text)["quality"]
    assert outputs["clicks"] == outputs["all"]


def test_another_model_fails_with_code_1_and_says_where(served: Served, other_bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, text = command(served.log, "--bundle", other_bundle, "--labels", served.labels, "--device", "cpu", "--report", page)
    assert code == 1
    assert "FAIL" in text
    assert "small 4" in text
    assert "as served" in text
    assert "FAIL" in page.read_text()
    code, text = command(served.log, "--bundle", other_bundle, "--device", "cpu", "--tolerance", "1", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["passed"]
    assert found["largest_difference"] > 1e-3
    assert found["reordered_requests"] > 0
    worst = found["worst"]
    assert worst["logged"] == pytest.approx(float(served.scores[worst["request_id"]][worst["index"]]))


def test_command_prints_a_verdict_and_writes_json_and_a_page(served: Served, bundle_dir: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "replay.json", tmp_path / "replay.html"
    code, text = command(served.log, "--bundle", bundle_dir, "--labels", served.labels, "--out", out, "--report", page, "--device", "cpu")
    assert code == 0
    assert "PASS" in text
    assert "GAUC" in text
    assert json.loads(out.read_text())["requests"] == NUM_REQUESTS
    assert "PASS" in page.read_text()
    code, text = command(served.log, "--target", served.target)
    assert code == 0
    assert "PASS" in text


def test_another_spec_is_refused_with_both_digests(served: Served, run: Run, bundle_dir: Path, tmp_path: Path) -> None:
    digest = "f" * 64
    replayer = BundleReplayer.load(bundle_dir, "cpu")
    foreign = (type(request)(**{**vars(request), "spec_digest": digest}) for request in read_log(served.log))
    with pytest.raises(DataError, match=rf"spec digest {digest}.*spec digest {run.spec.digest}"):
        replay(foreign, replayer)


def test_what_cannot_be_replayed_is_refused(served: Served, bundle_dir: Path, tmp_path: Path) -> None:
    code, text = command(served.log)
    assert code == 2
    assert "give one of --bundle and --target" in text
    assert command(served.log, "--bundle", bundle_dir, "--target", "x:1")[0] == 2
    with pytest.raises(DataError, match=r"gone"):
        command(tmp_path / "gone", "--bundle", bundle_dir, "--device", "cpu")
    with pytest.raises(NinerankError, match=r"request 'r0': no server answers at 127\.0\.0\.1:1"):
        command(served.log, "--target", "127.0.0.1:1", "--timeout-ms", "2000")
    whole = next(served.log.glob("*.parquet")).read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"short.parquet: cannot be read as a request log"):
        command(tmp_path / "short.parquet", "--bundle", bundle_dir, "--device", "cpu")


def test_labels_of_other_requests_are_refused(served: Served, bundle_dir: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"request_id": ["x"], "candidate_id": ["c0"], "label": [1]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match="none of the 1 labels met a request"):
        command(served.log, "--bundle", bundle_dir, "--labels", tmp_path / "labels.parquet", "--device", "cpu")


def test_an_empty_log_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    replayer = BundleReplayer.load(bundle_dir, "cpu")
    with pytest.raises(DataError, match="holds no requests"):
        replay(iter(()), replayer, log="here")
    RequestLog(tmp_path / "log", replayer._engine.schema, 1).close()
    with pytest.raises(DataError, match="holds no"):
        command(tmp_path / "log", "--bundle", bundle_dir, "--device", "cpu")
