"""The verbs export, serve and rank as a person runs them."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from ninerank.cli.main import main
from ninerank.evaluation.scorer import open_scorer
from ninerank.features.sources.synthetic import SyntheticConfig, generate
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import read_log
from ninerank.training.recipe import Recipe
from ninerank.training.trainer import Trainer

START = "from ninerank.cli.main import main; main()"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def ninerank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Done]]:
    """Runs `ninerank` in this process, which saves importing torch each time; leaves logging as it was."""
    root, own = logging.getLogger(), logging.getLogger("ninerank")
    handlers, levels = root.handlers[:], (root.level, own.level)

    def run(*words: str | Path, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        return Done(int(end.value.code or 0), *capsys.readouterr())

    yield run
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic")
    generate(SyntheticConfig(num_rows=4_000, num_users=200, num_items=60), directory)
    return directory


@pytest.fixture(scope="module")
def run_dir(log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    recipe = {
        "data": {"dir": str(log_dir), "train": "train.parquet", "valid": "valid.parquet"},
        "spec": str(log_dir / "spec.yaml"),
        "model": {"name": "din", "embedding_dim": 4, "mlp": {"hidden": [8]}, "attention_hidden": [4]},
        "schedule": {"epochs": 1},
        "device": "cpu",
    }
    (out.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    Trainer(Recipe.load(out.parent / "recipe.yaml"), out).fit()
    return out


@pytest.fixture(scope="module")
def bundle(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    words = ["export", str(run_dir), "--out", str(out), "--version", "3", "--json"]
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, timeout=300, env=environment(), check=True)
    manifest = json.loads(done.stdout)
    assert (manifest["model_name"], manifest["model_version"]) == ("din", "3")
    return out


@pytest.fixture
def server(bundle: Path, log_dir: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server process, its target and the address of its metrics."""
    words = ["serve", bundle, "--port", "0", "--metrics-port", "0", "--items", log_dir / "items.parquet", "--log", tmp_path / "log"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    found = re.fullmatch(r"serving din 3 on \S+ at (127\.0\.0\.1:\d+)\n", lines[0])
    assert found is not None, lines
    assert lines[1] == "feature cache: 60 items by item_id\n"
    try:
        yield process, found[1], lines[2].removeprefix("metrics at ").strip()
    finally:
        process.kill()
        process.communicate()


def test_a_bundle_scores_as_its_run_does(bundle: Path, run_dir: Path, log_dir: Path) -> None:
    rows = pq.read_table(log_dir / "test.parquet").combine_chunks().to_batches()[0]
    difference = np.abs(Engine.load(bundle, "cpu").score(rows) - open_scorer(run_dir, "cpu").score(rows)).max()
    assert difference <= 1e-6


def test_serve_rank_and_end(
    server: tuple[subprocess.Popen[str], str, str], bundle: Path, tmp_path: Path, ninerank: Callable[..., Done]
) -> None:
    process, target, metrics = server
    example = ninerank("rank", "--example", bundle, "--candidates", "4")
    assert example.code == 0, example.err
    asked = json.loads(example.out)
    assert len(asked["items"]) == len(asked["ids"]) == 4
    (tmp_path / "r.json").write_text(example.out)
    shown = ninerank("rank", "--target", target, "--request", tmp_path / "r.json", "--top-k", "2")
    assert shown.code == 0, shown.err
    assert len(re.findall(r"0\.\d{6}", shown.out)) == 2
    by_id = json.dumps({"user": asked["user"], "ids": [*asked["ids"], -1], "request_id": "by-id", "model": "din", "version": "3"})
    plain = ninerank("rank", "--target", target, "--request", "-", "--json", stdin=by_id)
    assert plain.code == 0, plain.err
    answer = json.loads(plain.out)
    assert answer["request_id"] == "by-id"
    assert answer["defaults_used"]["unknown_candidates"] == [4]
    ranked = answer["ranked"]
    assert [one["score"] for one in ranked] == sorted((one["score"] for one in ranked), reverse=True)
    assert {one["id"] for one in ranked} == {*asked["ids"], -1}
    with urllib.request.urlopen(metrics, timeout=30) as page:
        assert 'ninerank_requests_total{status="OK"} 2.0' in page.read().decode()
    other = ninerank("rank", "--target", target, "--request", "-", stdin=by_id.replace('"3"', '"4"'))
    assert other.code == 1
    assert "version '4' is not served here; served: 3" in other.err
    wrong = ninerank("rank", "--target", target, "--request", "-", stdin='{"user": {"user": 1}, "ids": [1]}')
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err.startswith("error: unknown user feature 'user'; ")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest == "stopped\n"
    engine = Engine.load(bundle, "cpu")
    logged = list(read_log(tmp_path / "log"))
    assert len(logged) == 2
    for request in logged:
        assert (engine.rank(request.input).scores_NT == request.scores_NT).all()


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["rank"], "", "--target and --request are needed"),
        (["rank", "--target", "127.0.0.1:1", "--request", "missing.json"], "", "missing.json: No such file"),
        (["rank", "--target", "127.0.0.1:1", "--request", "-"], "{", "is not valid JSON"),
        (["rank", "--target", "127.0.0.1:1", "--request", "-"], '{"usr": {}}', "unknown key 'usr'; did you mean 'user'"),
        (["rank", "--target", "127.0.0.1:1", "--request", "-"], "[]", "error: -"),
        (["rank", "--target", "127.0.0.1:1", "--request", "-"], '{"user": {}, "items": []}', "error: items is empty, and no ids are given"),
        (["rank", "--target", "127.0.0.1:1", "--request", "-"], '{"user": {}, "ids": [1]}', "no server answers at 127.0.0.1:1"),
        (["rank", "--example", "nowhere"], "", "nowhere: is no directory"),
        (["serve", "nowhere", "--port", "0"], "", "nowhere: is no directory"),
        (["export", "nowhere", "--out", "x"], "", "nowhere: is no run directory"),
        (["export", "nowhere", "--out", "x", "--tables", "int16"], "", "no table type 'int16'; did you mean"),
    ],
)
def test_mistakes_are_one_line(ninerank: Callable[..., Done], words: list[str], stdin: str, message: str) -> None:
    done = ninerank(*words, stdin=stdin)
    assert done.code == 1
    assert message in done.err
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


def test_a_bundle_is_not_overwritten(ninerank: Callable[..., Done], run_dir: Path, bundle: Path) -> None:
    done = ninerank("export", run_dir, "--out", bundle)
    assert done.code == 1
    assert "exists already" in done.err


def test_tables_in_fewer_bits(ninerank: Callable[..., Done], run_dir: Path, bundle: Path, log_dir: Path, tmp_path: Path) -> None:
    done = ninerank("export", run_dir, "--out", tmp_path / "small", "--tables", "int8")
    assert done.code == 0
    (difference,) = re.findall(r"^tables in deep fp16: golden scores move by at most (\S+)$", done.out, re.MULTILINE)
    rows = pq.read_table(log_dir / "test.parquet").combine_chunks().to_batches()[0]
    moved = np.abs(Engine.load(tmp_path / "small", "cpu").score(rows) - Engine.load(bundle, "cpu").score(rows)).max()
    assert 0 < moved <= 4 * float(difference) < 1e-3
