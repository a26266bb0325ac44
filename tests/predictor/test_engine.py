"""The engine gives the training model's scores, for rows and for requests alike."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ninerank.device import Device
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import BundleError, DataError, DeviceError, RequestError
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.fusion.backends import multiplies_bf16
from ninerank.predictor.bundle import Bundle, Golden, export_bundle
from ninerank.predictor.engine import Engine
from ninerank.predictor.request import RankInput, record_batch
from ninerank.predictor.requestlog import LoggedRequest, RequestLog, read_log
from ninerank.towers.config import parse_model
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import build_model

Rows = Callable[..., pa.RecordBatch]


@pytest.fixture(scope="module")
def engine(bundle_dir: Path) -> Engine:
    return Engine.load(bundle_dir, device="cpu")


def request_of(engine: Engine, rows: pa.RecordBatch, user_row: int = 0) -> RankInput:
    user = rows.select(engine.schema.request.names).slice(user_row, 1)
    return engine.schema.rank_input(user, rows.select(engine.schema.item.names))


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_rows_get_the_training_models_scores(engine: Engine, model: RankingModel, spec: FeatureSpec, log_rows: Rows, count: int) -> None:
    rows = log_rows(count, seed=count)
    with torch.inference_mode():
        wanted = torch.sigmoid(model(Transform(spec).batch(rows))).numpy()
    assert np.abs(engine.score(rows) - wanted).max() <= 1e-6


@pytest.mark.parametrize("count", [1, 2, 257])
def test_a_request_gets_the_scores_of_its_joined_rows(engine: Engine, log_rows: Rows, count: int) -> None:
    request = request_of(engine, log_rows(count, seed=5), user_row=count - 1)
    output = engine.rank(request)
    assert output.scores_NT.dtype == np.float32
    assert np.abs(output.scores_NT - engine.score(engine.schema.joined(request))).max() <= 1e-6


def test_a_score_does_not_depend_on_the_other_candidates(engine: Engine, log_rows: Rows) -> None:
    rows = log_rows(40, seed=6)
    together = engine.rank(request_of(engine, rows)).scores_NT
    user = rows.select(engine.schema.request.names).slice(0, 1)
    for n in (0, 7, 39):
        alone = engine.rank(engine.schema.rank_input(user, rows.select(engine.schema.item.names).slice(n, 1))).scores_NT
        assert np.abs(alone[0] - together[n]).max() <= 1e-6


def test_order_is_best_first_with_ties_by_index(engine: Engine, log_rows: Rows) -> None:
    rows = log_rows(20, seed=7)
    doubled = pa.Table.from_batches([rows, rows]).combine_chunks().to_batches()[0]
    output = engine.rank(request_of(engine, doubled))
    score = output.scores_NT[:, 0]
    assert sorted(output.order) == list(range(40))
    pairs = list(zip(output.order, output.order[1:], strict=False))
    assert all(score[a] > score[b] or (score[a] == score[b] and a < b) for a, b in pairs)
    assert any(score[a] == score[b] for a, b in pairs)
    assert engine.rank(request_of(engine, doubled), top_k=3).order.tolist() == output.order[:3].tolist()


def test_left_out_columns_take_the_features_default(engine: Engine, log_rows: Rows) -> None:
    rows = log_rows(3, seed=8)
    user, items = rows.select(["user_id"]).slice(0, 1), rows.select(["item_id", "price"])
    paris = items.append_column("city", pa.array(["paris"] * 3))
    scores = [engine.rank(engine.schema.rank_input(user, given)).scores_NT for given in (items, paris)]
    assert np.array_equal(*scores)


def test_numbers_that_are_not_finite_are_refused(engine: Engine) -> None:
    user = pa.record_batch({"user_id": ["u1"]})
    with pytest.raises(RequestError, match=r"'price', row 1: nan"):
        engine.rank(engine.schema.rank_input(user, pa.record_batch({"price": [1.0, float("nan")]})))
    with pytest.raises(RequestError, match=r"'age', row 0: inf"):
        engine.rank(engine.schema.rank_input(pa.record_batch({"age": [float("inf")]}), pa.record_batch({"price": [1.0]})))


def test_rows_without_a_column_are_refused(engine: Engine, log_rows: Rows) -> None:
    with pytest.raises(DataError, match="'city' is missing"):
        engine.score(log_rows(2).drop_columns(["city"]))


def test_threads_get_the_same_scores(engine: Engine, log_rows: Rows) -> None:
    requests = [request_of(engine, log_rows(30 + n, seed=n)) for n in range(8)]
    wanted = [engine.rank(request).scores_NT for request in requests]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for step in range(30):
            n = (offset + step) % len(requests)
            if not np.array_equal(engine.rank(requests[n]).scores_NT, wanted[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_tables_stay_mapped_from_their_files(engine: Engine, bundle_dir: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc on this system")
    assert str(bundle_dir / "tables" / "deep.safetensors") in maps.read_text()


def test_golden_scores_that_are_not_met_are_named(bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    moved = dataclasses.replace(bundle, golden=Golden(bundle.golden.rows, bundle.golden.scores_BT + np.float32(1e-3)))
    with pytest.raises(BundleError, match=r"golden scores of small 7 differ by 0\.001 on cpu, at most 1e-05 is allowed"):
        Engine(bundle, Device.resolve("cpu")).check_golden(moved)
    broken = dataclasses.replace(bundle, golden=Golden(bundle.golden.rows, bundle.golden.scores_BT * np.float32("nan")))
    with pytest.raises(BundleError, match="differ by nan"):
        Engine(bundle, Device.resolve("cpu")).check_golden(broken)


def test_tables_of_another_shape_are_refused(bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    cut = dataclasses.replace(bundle, tables={**bundle.tables, "deep": bundle.tables["deep"][:-1]})
    with pytest.raises(BundleError, match="group 'deep': storage is"):
        Engine(cut, Device.resolve("cpu"))
    narrow = dataclasses.replace(bundle, tables={**bundle.tables, "deep": bundle.tables["deep"][:, :3]})
    with pytest.raises(BundleError, match=r"tables of 'deep': tables in fp32 of dim 4 are .* these are torch.float32 \(\d+, 3\)"):
        Engine(narrow, Device.resolve("cpu"))


@pytest.mark.parametrize("role", ["user", "item"])
def test_a_spec_with_one_side_alone_is_served_and_logged(role: str, tmp_path: Path) -> None:
    features = [{"name": name, "kind": "id", "role": role, "encoding": {"kind": "hashed", "num_buckets": 9}} for name in ("a", "b")]
    spec = FeatureSpec.parse({"labels": ["y"], "features": features}, "spec")
    model = build_model(parse_model({"name": "lr"}), spec, EmbeddingConfig(init_std=1.0), seed=1)
    rows = pa.record_batch({"a": ["x", "y", None], "b": ["u", "u", "v"]})
    export_bundle(model, spec, rows, tmp_path / "bundle", model_name="lr", version="1")
    engine = Engine.load(tmp_path / "bundle", "cpu")
    empty = record_batch([], pa.schema([]), 3)
    given = (rows.slice(0, 1), empty) if role == "user" else (empty.slice(0, 1), rows)
    request = engine.schema.rank_input(*given)
    scores_NT = engine.rank(request).scores_NT
    wanted = engine.score(rows.take([0, 0, 0]) if role == "user" else rows)
    assert np.abs(scores_NT - wanted).max() <= 1e-6
    with RequestLog(tmp_path / "log", engine.schema, 1) as log:
        log.write(LoggedRequest("r", 1, "lr", "1", spec.digest, None, request, scores_NT))
    (logged,) = read_log(tmp_path / "log")
    assert np.array_equal(engine.rank(logged.input).scores_NT, scores_NT)


@pytest.mark.parametrize("backend", ["script", "eager"])
def test_backends_give_the_same_scores(engine: Engine, bundle_dir: Path, backend: str) -> None:
    rows = Bundle.load(bundle_dir).golden.rows
    other = Engine.load(bundle_dir, "cpu", backend=backend)
    np.testing.assert_allclose(other.score(rows), engine.score(rows), atol=1e-6)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has neither AMX nor AVX512-bf16")
def test_bf16_is_held_to_its_budget(engine: Engine, bundle_dir: Path) -> None:
    bundle = Bundle.load(bundle_dir)
    rounded = Engine.load(bundle_dir, "cpu", precision="bf16")
    difference = np.abs(rounded.score(bundle.golden.rows) - engine.score(bundle.golden.rows)).max()
    assert 0 < difference < 2e-3
    with pytest.raises(BundleError, match="is not served"):
        rounded.check_golden(bundle, tolerance=-2e-3)


def test_what_cannot_run_here_is_refused(bundle_dir: Path) -> None:
    with pytest.raises(DeviceError, match="unknown backend 'tensorrt'"):
        Engine.load(bundle_dir, "cpu", backend="tensorrt")
