"""Comparisons: the intervals hold, the better of two bundles is found, equal ones are not told apart, wrong input is refused.

The truth: a click has probability sigmoid(-1.5 + x1 + x2 + x3). `noisy` reads x1 alone, `other` x2 alone (as good as `noisy`, by symmetry,
and truly different), `better` x1 and x2.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import DataError, SpecError
from ninerank.evaluation.compare.differences import differences, sliced
from ninerank.evaluation.compare.page import comparison_page
from ninerank.evaluation.compare.rules import Guardrails, Rules
from ninerank.evaluation.compare.run import compare_bundles
from ninerank.evaluation.compare.scoring import Compared, CompareJob
from ninerank.evaluation.compare.sequential import always_valid, always_valid_p, holm
from ninerank.evaluation.compare.verdict import compare
from ninerank.evaluation.joined import JoinStats
from ninerank.features.spec import FeatureSpec
from ninerank.metrics.intervals import normal_interval
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import LoggedRequest, RequestLog
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model

NUM_REQUESTS, CANDIDATES = 400, 8


def bundle_reading(out: Path, columns: tuple[str, ...], weight: float = 1.0, bias: float = -1.5) -> Path:
    """A bundle whose logit is bias + weight * (sum of the columns)."""
    hashed = {"kind": "hashed", "num_buckets": 4}
    spec = FeatureSpec.model_validate(
        {
            "labels": ["click"],
            "features": [
                {"name": "device", "kind": "id", "role": "user", "encoding": hashed},
                *({"name": name, "kind": "numeric", "role": "item"} for name in columns),
            ],
        }
    )
    model = build_model(parse_model({"name": "lr"}), spec, EmbeddingConfig(init_std=0.0), seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.tower.named_parameters():
            parameter.fill_(bias if "bias" in name else weight)
    golden = pa.record_batch({"device": ["phone", "tv"], **{name: [0.5, -0.5] for name in columns}})
    export_bundle(model, spec, golden, out, model_name=out.name, version="1")
    return out


@dataclass(frozen=True)
class World:
    """Bundles, a log that `noisy` served, and the true probability of each candidate."""

    bundles: dict[str, Path]
    log: Path
    chance_RN: np.ndarray

    def labels(self, path: Path, seed: int) -> Path:
        """A draw of all clicks."""
        clicks = (np.random.default_rng(seed).random(self.chance_RN.shape) < self.chance_RN).astype(np.int8)
        request, index = np.indices(clicks.shape)
        ids = pa.array([f"r{n}" for n in range(len(clicks))]).take(pa.array(request.ravel()))
        pq.write_table(pa.table({"request_id": ids, "index": index.ravel(), "click": clicks.ravel()}), path)
        return path

    def job(self, a: str | None, b: str, labels: Path, **options: Any) -> CompareJob:
        return CompareJob(self.log, labels, self.bundles[b], None if a is None else self.bundles[a], device="cpu", **options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    out = tmp_path_factory.mktemp("compare")
    reads = {"noisy": ("x1",), "other": ("x2",), "better": ("x1", "x2"), "all": ("x1", "x2", "x3")}
    bundles = {name: bundle_reading(out / name, columns) for name, columns in reads.items()}
    engine = Engine.load(bundles["all"], "cpu")
    rng = np.random.default_rng(0)
    x_RNF = rng.normal(0, 0.8, (NUM_REQUESTS, CANDIDATES, 3))
    with RequestLog(out / "log", engine.schema, 1) as log:
        for n, x_NF in enumerate(x_RNF):
            user = pa.record_batch({"device": [("phone", "tv", "desk")[n % 3]]})
            features = engine.schema.rank_input(user, pa.record_batch({f"x{f + 1}": x_NF[:, f] for f in range(3)}))
            ids = pa.array([f"i{n % 7}.{k}" for k in range(CANDIDATES)])
            about = ("all", "1", engine.manifest.spec_digest, ids, features, engine.rank(features).scores_NT)
            assert log.write(LoggedRequest(f"r{n}", n, *about, defaulted=("x3",) if n % 10 == 0 else ()))
    return World(bundles, out / "log", 1 / (1 + np.exp(1.5 - x_RNF.sum(2))))


def compared(label_M: np.ndarray, a_M: np.ndarray, b_M: np.ndarray, request_M: np.ndarray, **changes: Any) -> Compared:
    """Rows without anything else."""
    found = Compared(
        label_M=label_M.astype(np.int8),
        a_M=a_M.astype(np.float32),
        b_M=b_M.astype(np.float32),
        request_M=request_M,
        slices={},
        a_us_R=np.array([100.0]),
        b_us_R=np.array([100.0]),
        a_items={1, 2},
        b_items={1, 2},
        num_requests=len(np.unique(request_M)),
        num_candidates=len(label_M),
        num_defaulted=0,
        changed=[],
        absent={},
        joined=JoinStats(),
    )
    return replace(found, **changes)


@given(value=st.floats(-3, 3), error=st.floats(0.01, 2), units=st.integers(2, 100_000), horizon=st.integers(2, 100_000))
def test_the_always_valid_p_value_and_interval_agree(value: float, error: float, units: int, horizon: int) -> None:
    found = normal_interval(value, error**2)
    always = always_valid(found, units, horizon=horizon)
    assert always.low <= found.low
    assert always.high >= found.high
    excludes = always.low > 0 or always.high < 0
    p_value = always_valid_p(found, units, horizon=horizon)
    if abs(p_value - 0.05) > 1e-9:
        assert excludes == (p_value < 0.05)


def test_looking_at_every_request_keeps_the_error_below_its_level() -> None:
    """Means of noise, looked at after each of 2,000 units: the fixed interval misses zero at some look far more often than 5%."""
    rng = np.random.default_rng(1)
    runs, units = 400, 2000
    draws = rng.normal(0, 1, (runs, units)).cumsum(1)
    count = np.arange(1, units + 1)
    z = np.abs(draws) / np.sqrt(count)
    looks = range(20, units, 10)
    fixed = np.mean(np.any(z[:, 20:] > 1.96, axis=1))
    p_of = {k: always_valid_p(normal_interval(1.0, 1.0), k, horizon=1000) for k in looks}
    assert all(0 < p <= 1 for p in p_of.values())
    bound = {k: always_valid(normal_interval(0.0, 1.0), k, horizon=1000).high for k in looks}
    always = np.mean(np.any(np.stack([z[:, k - 1] > bound[k] for k in looks]), axis=0))
    assert fixed > 0.25
    assert always <= 0.05


def test_holm_by_hand_and_bounded() -> None:
    assert holm([]) == []
    assert holm([0.5, 0.5]) == [1.0, 1.0]
    assert holm([0.01, 0.02, 0.9]) == pytest.approx([0.03, 0.04, 0.9])


def test_differences_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(3)
    label, request = (rng.random(3000) < 0.3).astype(int), np.repeat(np.arange(300), 10)
    a, b = rng.random(3000), np.clip(0.3 * label + 0.7 * rng.random(3000), 0, 1)
    found = differences(compared(label, a, b, request), Rules())
    from sklearn.metrics import log_loss, roc_auc_score

    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    assert found["auc"].fixed.value == pytest.approx(roc_auc_score(label, b32) - roc_auc_score(label, a32), abs=1e-9)
    expected = log_loss(label, np.clip(b32, 1e-7, 1 - 1e-7)) - log_loss(label, np.clip(a32, 1e-7, 1 - 1e-7))
    assert found["logloss"].fixed.value == pytest.approx(expected, abs=1e-6)
    for own in found.values():
        assert own.fixed.value == pytest.approx(own.b - own.a, abs=1e-9)
        assert own.always.low < own.fixed.low < own.fixed.value < own.fixed.high < own.always.high
        assert own.gain > 0 or own.metric in {"logloss", "ne"}
        assert own.num_requests == 300
    one_class = differences(compared(np.zeros(10, int), a[:10], b[:10], request[:10]), Rules())
    assert math.isnan(one_class["auc"].a)
    assert one_class["auc"].p_value == 1.0
    json.dumps([own.as_dict() for own in one_class.values()], allow_nan=False)


def test_slices_are_corrected_over_all_of_them() -> None:
    rng = np.random.default_rng(5)
    label, request = (rng.random(4000) < 0.3).astype(int), np.repeat(np.arange(400), 10)
    a = np.clip(0.2 * label + 0.8 * rng.random(4000), 0, 1)
    b = np.where(request % 2, a, np.clip(0.9 * label + 0.1 * rng.random(4000), 0, 1))
    kind = pa.array(np.where(request % 2, "same", "better"))
    kinds = pa.chunked_array([kind.slice(0, 1000), kind.slice(1000)])
    rows = compared(label, a, b, request, slices={"kind": kinds, "flat": pa.chunked_array([pa.array(["x"] * 4000)])})
    found = sliced(rows, Rules())
    assert set(found["kind"]) == {"same", "better"}
    assert found["kind"]["better"].adjusted < 1e-6
    assert found["kind"]["same"].fixed.value == 0
    assert found["kind"]["same"].adjusted == 1.0
    assert found["kind"]["better"].adjusted >= found["kind"]["better"].p_value
    assert found["flat"]["x"].num_rows == 4000


def test_guardrails_hold_a_better_model_back() -> None:
    rng = np.random.default_rng(7)
    label, request = (rng.random(5000) < 0.3).astype(int), np.repeat(np.arange(500), 10)
    a, b = rng.random(5000) * 0.6, np.clip(0.5 * label + 0.15 * rng.random(5000) + 0.075, 0, 1)
    good = compare(compared(label, a, b, request), Rules(), names=("a", "b"))
    assert good.outcome == "b_better"
    for change, bounds, name in (
        ({"b_us_R": np.array([300.0])}, {}, "time a request, p99, B / A"),
        ({"b_items": {1}}, {}, "items shown, B / A"),
        ({"num_defaulted": 4000}, {"max_default_share": 0.1}, "share of candidates with defaults"),
        ({"b_M": (b * 0.5).astype(np.float32)}, {}, "PCOC of B"),
        ({"b_M": (b * 0.5).astype(np.float32)}, {"max_ece": 0.01}, "ECE of B"),
    ):
        rules = Rules(guardrails=Guardrails(**bounds))
        held = compare(replace(compared(label, a, b, request), **change), rules, names=("a", "b"))
        assert held.outcome == "b_better"
        assert not held.launch
        assert name in {own.name for own in held.guardrails if not own.passed}
        assert name in held.sentence()
    swapped = compare(compared(label, b, a, request), Rules(), names=("a", "b"))
    assert swapped.outcome == "a_better"
    worth = compare(compared(label, a, b, request), Rules(min_effect=0.9), names=("a", "b"))
    assert worth.outcome == "no_difference"
    assert "worth a launch" in worth.sentence()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("primary: acu\n", "primary.*auc"),
        ("guardrail: {}\n", "guardrail.*guardrails"),
        ("guardrails: {min_pcoc: 2, max_pcoc: 1}\n", "min_pcoc 2 is above max_pcoc 1"),
        ("level: 1.5\n", "level"),
    ],
)
def test_wrong_rules_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rules.yaml").write_text(text)
    with pytest.raises(SpecError, match=said):
        Rules.load(tmp_path / "rules.yaml")


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(build("compare"), ["compare", *map(str, arguments), "--device", "cpu"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_better_of_two_bundles_is_found_and_shown(world: World, tmp_path: Path) -> None:
    labels = world.labels(tmp_path / "labels.parquet", 1)
    page, out = tmp_path / "page.html", tmp_path / "found.json"
    given = ("--log", world.log, "--labels", labels, "--slice", "device")
    code, text = command(world.bundles["noisy"], world.bundles["better"], *given, "--report", page, "--out", out)
    assert code == 0
    assert "B is better: auc differs by +0." in text
    found = json.loads(out.read_text())
    assert found["outcome"] == "b_better"
    assert set(found["slices"]["device"]) == {"phone", "tv", "desk"}
    assert found["absent_columns"] == {"a": [], "b": []}
    sample = found["samples"][0]["candidates"][0]
    assert {name for name, _ in sample["b_why"]} <= {"device", "x1", "x2"}
    assert "x2" in {name for name, _ in sample["b_why"]}
    assert "x2" not in {name for name, _ in sample["a_why"]}
    for shown in ("B IS BETTER", "What changed", "AUC by device", found["samples"][0]["request_id"]):
        assert shown in page.read_text(encoding="utf-8")
    code, text = command(world.bundles["better"], world.bundles["noisy"], *given, "--gate")
    assert code == 1
    assert "A is better" in text
    code, text = command("served", world.bundles["better"], *given, "--json")
    assert json.loads(text)["a"] == "scores as served"
    assert json.loads(text)["outcome"] == "a_better", "all three columns were read when it was served"


def test_processes_find_what_one_finds(world: World, tmp_path: Path) -> None:
    job = world.job("noisy", "better", world.labels(tmp_path / "labels.parquet", 2), slices=("device",))
    one, two = (compare_bundles(job, Rules(), processes=processes).as_dict() for processes in (1, 2))
    for found in (one, two):
        found["guardrails"] = [own for own in found["guardrails"] if "time" not in own["name"]]
        found.pop("samples")
    for name, own in one["metrics"].items():
        assert two["metrics"][name]["difference"] == pytest.approx(own["difference"], abs=1e-9)
        assert two["metrics"][name]["interval"] == pytest.approx(own["interval"], abs=1e-9)
    assert two["labels"] == one["labels"]
    for own, other in zip(one["guardrails"], two["guardrails"], strict=True):
        assert {**own, "found": pytest.approx(own["found"])} == other


def test_what_cannot_be_compared_is_refused(world: World, tmp_path: Path) -> None:
    labels = world.labels(tmp_path / "labels.parquet", 1)
    with pytest.raises(DataError, match="slice 'devise' is no logged feature.*device"):
        compare_bundles(world.job("noisy", "other", labels, slices=("devise",)), Rules())
    pq.write_table(pa.table({"request_id": ["none"], "index": [0], "click": [1]}), tmp_path / "stray.parquet")
    with pytest.raises(DataError, match="none of the 1 labels met a request"):
        compare_bundles(world.job("noisy", "other", tmp_path / "stray.parquet"), Rules())


@pytest.mark.browser
def test_a_browser_shows_the_page(browser: Any, world: World, tmp_path: Path) -> None:
    job = world.job("noisy", "better", world.labels(tmp_path / "labels.parquet", 4), slices=("device",))
    page = tmp_path / "page.html"
    page.write_text(comparison_page(compare_bundles(job, Rules())), encoding="utf-8")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert "B is better" in browser.find_element("css selector", ".verdict").text
    charts = browser.find_elements("css selector", "svg[role=img]")
    assert len(charts) == 7
    assert all(chart.is_displayed() and chart.size["height"] > 80 for chart in charts)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def repeats(world: World, tmp_path: Path, a: str, b: str, count: int, first_seed: int) -> list[str]:
    """Outcomes of `ninerank compare` over draws of the labels."""
    found = []
    for seed in range(first_seed, first_seed + count):
        labels = world.labels(tmp_path / "labels.parquet", seed)
        code, text = command(world.bundles[a], world.bundles[b], "--log", world.log, "--labels", labels, "--json")
        assert code == 0
        found.append(json.loads(text)["outcome"])
    return found


@pytest.mark.parametrize(("count", "least"), [pytest.param(4, 4), pytest.param(100, 95, marks=pytest.mark.slow)])
def test_the_better_bundle_is_named_and_equal_ones_are_not_told_apart(world: World, tmp_path: Path, count: int, least: int) -> None:
    assert repeats(world, tmp_path, "noisy", "better", count, 100).count("b_better") >= least
    assert repeats(world, tmp_path, "noisy", "other", count, 300).count("no_difference") >= least
