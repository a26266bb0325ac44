"""Values kept by item give the scores of the whole graph, whatever is kept, forgotten, or asked for at once."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import RequestError
from ninerank.features.spec import FeatureSpec
from ninerank.fusion.backends import multiplies_bf16
from ninerank.fusion.capture import GraphInput
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.engine import Engine
from ninerank.predictor.itemvalues import ItemStore
from ninerank.predictor.request import RankInput
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model

Rows = Callable[..., pa.RecordBatch]
VALUE = (GraphInput("value.a", "item", ("B", 3)), GraphInput("value.b", "item", ("B", 2, 2)))
BYTES = 64 + 4 * 7


@pytest.fixture(scope="module")
def bundle(spec: FeatureSpec, log_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(parse_model({"name": "dcnv2", "embedding_dim": 8}), spec, EmbeddingConfig(init_std=0.5), seed=0).eval()
    out = tmp_path_factory.mktemp("values") / "dcn"
    export_bundle(model, spec, log_rows(64), out, model_name="dcn", version="1")
    return out


def request_of(engine: Engine, rows: pa.RecordBatch, user: int = 0) -> RankInput:
    items = rows.select(engine.schema.item.names)
    return engine.schema.rank_input(rows.select(engine.schema.request.names).slice(user, 1), items)


PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not multiplies_bf16(), reason="no bf16 here"))]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_requests_by_key_get_the_scores_of_the_whole_graph(bundle: Path, log_rows: Rows, precision: str) -> None:
    engine = Engine.load(bundle, precision=precision, item_values_mb=1)  # type: ignore[arg-type]
    store = engine.item_store
    assert store is not None
    assert len(store) == 0  # what the check of the golden rows left is gone
    rows, allowed = log_rows(50, seed=3), 1e-6 if precision == "fp32" else 2e-3
    keys = np.arange(50) % 40
    same = rows.take(pa.array(keys))  # equal keys, equal items
    for user in range(4):
        request = RankInput(request_of(engine, rows, user).user, request_of(engine, same).items)
        chosen = slice(0, 20 + 10 * user)
        part = RankInput(request.user, request.items[chosen])
        got = engine.rank(part, item_keys=keys[chosen])
        assert np.abs(got.scores_NT - engine.rank(part).scores_NT).max() <= allowed
    assert len(store) == 40
    assert (store.misses, store.hits) == (20 + 10 + 10 + 0 + 64, 64 + 0 + 20 + 30 + 50)  # with the 64 golden rows, twice


def test_items_without_a_key_are_computed_and_not_kept(bundle: Path, log_rows: Rows) -> None:
    engine = Engine.load(bundle, item_values_mb=1)
    rows = log_rows(30, seed=4)
    request, keys = request_of(engine, rows), np.where(np.arange(30) % 3 == 0, -1, np.arange(30))
    for _ in range(2):
        assert np.abs(engine.rank(request, item_keys=keys).scores_NT - engine.rank(request).scores_NT).max() <= 1e-6
    assert engine.item_store is not None
    assert len(engine.item_store) == 20


def test_keys_are_one_a_candidate_and_of_no_meaning_without_a_store(bundle: Path, log_rows: Rows) -> None:
    engine = Engine.load(bundle)
    request = request_of(engine, log_rows(5, seed=5))
    assert engine.item_store is None
    assert np.array_equal(engine.rank(request, item_keys=np.zeros(5, np.int64)).scores_NT, engine.rank(request).scores_NT)
    with pytest.raises(RequestError, match="4 item keys for 5 candidates"):
        engine.rank(request, item_keys=np.zeros(4, np.int64))


def test_a_model_without_values_by_item_says_so_and_scores(bundle_dir: Path, log_rows: Rows, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine.load(bundle_dir, item_values_mb=1)  # its attention reads an item's embedding beside the history
    request = request_of(engine, log_rows(9, seed=6))
    expected = engine.item_store is None
    assert expected == ("keeps no values by item" in caplog.text)
    assert np.abs(engine.rank(request, item_keys=np.arange(9)).scores_NT - engine.rank(request).scores_NT).max() <= 1e-6


def test_threads_share_a_store_that_is_too_small(bundle: Path, log_rows: Rows) -> None:
    engine = Engine.load(bundle, item_values_mb=0.02)
    assert engine.item_store is not None
    assert 2 <= engine.item_store.capacity < 60
    rows = log_rows(60, seed=7)
    request, wrong = request_of(engine, rows), list[float]()
    wanted = engine.rank(request).scores_NT

    def work(seed: int) -> None:
        draw = np.random.default_rng(seed)
        for _ in range(15):
            chosen = draw.integers(0, 60, 25)
            got = engine.rank(RankInput(request.user, request.items.take(pa.array(chosen))), item_keys=chosen)
            wrong.append(float(np.abs(got.scores_NT - wanted[chosen]).max()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60
    assert max(wrong) <= 1e-6


@settings(max_examples=40, deadline=None)
@given(
    capacity=st.integers(1, 12),
    asked=st.lists(st.lists(st.integers(-2, 20), min_size=1, max_size=12), min_size=1, max_size=12),
)
def test_a_store_answers_with_what_was_kept_and_stays_within_its_capacity(capacity: int, asked: list[list[int]]) -> None:
    store = ItemStore(VALUE, {}, capacity * BYTES)
    assert store.capacity == capacity
    for keys in asked:
        key_N = np.array(keys, np.int64)
        values, missing_M = store.read(key_N)
        for place, key in enumerate(keys):
            if place not in missing_M:
                assert values[0][place].tolist() == [key] * 3
                assert values[1][place].flatten().tolist() == [-key] * 4
        assert {place for place, key in enumerate(keys) if key < 0} <= set(missing_M.tolist())
        own = torch.from_numpy(key_N[missing_M]).float()
        store.keep(key_N[missing_M], [own[:, None].expand(-1, 3), -own[:, None, None].expand(-1, 2, 2)])
        assert len(store) <= capacity
        new = {keys[place] for place in missing_M if keys[place] >= 0}
        found = set(key_N[np.setdiff1d(np.arange(len(keys)), store.read(key_N)[1])].tolist())
        assert len(found) >= min(len(new), capacity)
        assert new <= found or len(new) > capacity


def test_a_store_forgets_what_was_not_asked_for_lately() -> None:
    store = ItemStore(VALUE, {}, 8 * BYTES)

    def ask(*keys: int) -> list[int]:
        key_N = np.array(keys, np.int64)
        missing = key_N[store.read(key_N)[1]]
        store.keep(missing, [torch.zeros(len(missing), 3), torch.zeros(len(missing), 2, 2)])
        return missing.tolist()

    assert ask(*range(8)) == list(range(8))
    assert ask(0, 1, 2, 3) == []
    assert ask(*range(10, 14)) == [10, 11, 12, 13]
    assert ask(0, 1, 2, 3) == []
    assert ask(4) == [4]


def test_a_store_that_holds_no_item_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no item: one takes 92"):
        ItemStore(VALUE, {}, 91)
