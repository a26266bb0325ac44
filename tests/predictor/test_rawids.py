"""Bundles of models with dynamic tables: the engine scores raw ids, known and unknown, as the trained model does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ninerank.device import Device
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.dynamic.frozen import FrozenIds
from ninerank.errors import BundleError
from ninerank.features.spec import MISSING_ID, FeatureSpec
from ninerank.features.transform import Transform
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.predictor.engine import Engine
from ninerank.predictor.manifest import Manifest, hash_file
from ninerank.predictor.rawids import RawIds, lookup_spec
from ninerank.towers.config import parse_model
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import build_model

Rows = Callable[..., pa.RecordBatch]
DYNAMIC = {"kind": "dynamic"}


SMALL = FeatureSpec.parse(
    {
        "labels": ["click"],
        "features": [
            {"kind": "id", "name": "user", "role": "user", "dtype": "int64", "encoding": DYNAMIC},
            {"kind": "sequence", "name": "seen", "role": "user", "of": "item", "max_length": 3},
            {"kind": "id", "name": "hour", "role": "context", "dtype": "int64", "encoding": {"kind": "hashed", "num_buckets": 24}},
            {"kind": "id", "name": "item", "role": "item", "dtype": "int64", "encoding": DYNAMIC},
            {"kind": "id", "name": "tags", "role": "item", "dtype": "int64", "encoding": DYNAMIC, "multi": True},
            {
                "kind": "id",
                "name": "related",
                "role": "item",
                "dtype": "int64",
                "encoding": DYNAMIC,
                "multi": True,
                "table": "item",
                "default": 5,
            },
        ],
    },
    "spec",
)
ids = st.one_of(st.none(), st.sampled_from([0, -1, MISSING_ID, (1 << 63) - 1]), st.integers(-6, 6))
bags = st.one_of(st.none(), st.lists(ids, max_size=4))
COLUMNS = {"user": ids, "hour": st.integers(0, 30), "item": ids, "seen": bags, "tags": bags, "related": bags}


@given(st.lists(st.fixed_dictionaries(COLUMNS), max_size=8), st.data())
def test_rows_take_the_place_of_raw_ids_feature_by_feature(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    known = {name: sorted(data.draw(st.sets(st.integers(-8, 8)))) for name in ("user", "item", "tags")}
    tables = {name: FrozenIds(name, torch.tensor(own, dtype=torch.int64)) for name, own in known.items()}
    batch = Transform(SMALL).batch(pa.RecordBatch.from_pylist(rows, schema=pa.schema([(n, _type(n)) for n in COLUMNS])))
    found = RawIds(SMALL, tables).rows(batch)
    fixed = lookup_spec(SMALL, {name: len(own) for name, own in known.items()})
    assert fixed.tables["item"].features == SMALL.tables["item"].features
    for before, after in ((batch.request, found.request), (batch.item, found.item)):
        for kind in ("single", "bags", "sequences"):
            raw, own = getattr(before, kind), getattr(after, kind)
            assert (raw.keys, raw.num_rows) == (own.keys, own.num_rows)
            for key in raw.keys:
                name = SMALL.table_of(key)
                assert name is not None
                place = {one: row for row, one in enumerate(known.get(name, ()), 1)}
                wanted = [place.get(one, 0) for one in raw[key].values.tolist()] if name in known else raw[key].values.tolist()
                assert own[key].values.tolist() == wanted
                assert max(wanted, default=0) < fixed.tables[name].num_rows


def _type(name: str) -> pa.DataType:
    return pa.int64() if name in {"user", "hour", "item"} else pa.list_(pa.int64())


@pytest.fixture(scope="module")
def dynamic_spec(spec: FeatureSpec) -> FeatureSpec:
    """The small model's spec with most tables dynamic: single ids on both sides, a bag, and a history with its own item table."""
    document = json.loads(spec.canonical_json())
    for feature in document["features"]:
        if feature["name"] in {"user_id", "hour", "item_id", "tags", "city"}:
            feature["encoding"] = DYNAMIC
    return FeatureSpec.parse(document, "spec")


@pytest.fixture(scope="module")
def dynamic_model(dynamic_spec: FeatureSpec, model: RankingModel, log_rows: Rows) -> RankingModel:
    """The small tower over dynamic tables that saw some rows; the rest of what `log_rows` draws is unknown to it."""
    collection = EmbeddingCollection(dynamic_spec, {"deep": 4, "linear": 1}, EmbeddingConfig(init_std=1.0), seed=1)
    collection.prepare(Transform(dynamic_spec).batch(log_rows(40, seed=11)), step=0)
    collection.finish_step(0)
    return RankingModel(collection, model.tower).eval()


@pytest.fixture(scope="module")
def dynamic_dir(dynamic_model: RankingModel, dynamic_spec: FeatureSpec, log_rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests read and never change."""
    out = tmp_path_factory.mktemp("bundle") / "dynamic"
    export_bundle(dynamic_model, dynamic_spec, log_rows(64), out, model_name="dynamic", version="1")
    return out


@pytest.fixture(scope="module")
def engine(dynamic_dir: Path) -> Engine:
    return Engine.load(dynamic_dir, "cpu")


def test_it_holds_ids_in_rising_order_and_rows_in_theirs(dynamic_dir: Path, dynamic_model: RankingModel, dynamic_spec: FeatureSpec) -> None:
    bundle = Bundle.load(dynamic_dir)
    names = ["city", "hour", "item_id", "tags", "user_id"]
    assert sorted(path.name for path in (dynamic_dir / "ids").iterdir()) == [f"{name}.safetensors" for name in names]
    assert bundle.manifest.dynamic == {name: len(bundle.ids[name]) for name in bundle.ids}
    layout = EmbeddingCollection.of_tables(lookup_spec(dynamic_spec, bundle.manifest.dynamic), bundle.tables, EmbeddingConfig()).layout
    for name in names:
        id_I = bundle.ids[name]
        assert len(id_I) > 4
        assert bool((id_I.diff() > 0).all())
        managed = dynamic_model.embedding.managed[name]
        row_N = managed.prepare(id_I)
        for group in ("deep", "linear"):
            stored = bundle.tables[group][layout.rows_of(name)]
            assert not stored[0].any()
            assert torch.equal(stored[1:], managed.rows(group, row_N))
    for group, own in dynamic_model.embedding.named_groups():
        assert torch.equal(bundle.tables[group][layout.rows_of("bucket")], own.table("bucket"))


@pytest.mark.parametrize("count", [1, 2, 200])
def test_rows_and_requests_get_the_training_models_scores(
    engine: Engine, dynamic_model: RankingModel, dynamic_spec: FeatureSpec, log_rows: Rows, count: int
) -> None:
    rows = log_rows(count, seed=count)
    with torch.inference_mode():
        wanted = torch.sigmoid(dynamic_model(Transform(dynamic_spec).batch(rows))).numpy()
    assert np.abs(engine.score(rows) - wanted).max() <= 1e-6
    request = engine.schema.rank_input(rows.select(engine.schema.request.names).slice(0, 1), rows.select(engine.schema.item.names))
    assert np.abs(engine.rank(request).scores_NT - engine.score(engine.schema.joined(request))).max() <= 1e-6


def test_an_unknown_id_scores_as_a_missing_one(engine: Engine, log_rows: Rows) -> None:
    rows = log_rows(50, seed=4)
    for column, unknown in {"user_id": "nobody", "hour": -77, "item_id": "nothing"}.items():
        place, kind = rows.schema.get_field_index(column), rows.schema.field(column).type
        unseen = rows.set_column(place, column, pa.array([unknown] * 50, kind))
        missing = rows.set_column(place, column, pa.nulls(50, kind))
        assert np.array_equal(engine.score(unseen), engine.score(missing))
        assert not np.array_equal(engine.score(unseen), engine.score(rows))


@pytest.mark.parametrize("tables", ["fp16", "int8"])
def test_quantised_rows_of_dynamic_tables(dynamic_spec: FeatureSpec, log_rows: Rows, tables: str, tmp_path: Path) -> None:
    model = build_model(
        parse_model({"name": "deepfm", "embedding_dim": 16, "mlp": {"hidden": [4]}}), dynamic_spec, EmbeddingConfig(init_std=0.1), seed=2
    ).eval()
    rows = log_rows(64)
    model.embedding.prepare(Transform(dynamic_spec).batch(rows), step=0)
    model.embedding.finish_step(0)
    manifest = export_bundle(model, dynamic_spec, rows, tmp_path / "a", model_name="small", version="1", tables=tables)
    assert manifest.table_dtypes["deep"] == tables
    engine = Engine.load(tmp_path / "a", "cpu")
    unseen = log_rows(64, seed=5)
    with torch.inference_mode():
        wanted = torch.sigmoid(model(Transform(dynamic_spec).batch(unseen))).numpy()
    assert np.abs(engine.score(unseen) - wanted).max() <= 1e-3


@settings(max_examples=20)
@given(st.lists(st.fixed_dictionaries(COLUMNS), min_size=1, max_size=8))
def test_any_int64_scores_as_in_training(small: tuple[RankingModel, Engine], rows: list[dict[str, Any]]) -> None:
    model, engine = small
    batch = pa.RecordBatch.from_pylist(rows, schema=pa.schema([(name, _type(name)) for name in COLUMNS]))
    with torch.inference_mode():
        wanted = torch.sigmoid(model(Transform(SMALL).batch(batch))).numpy()
    assert np.abs(engine.score(batch) - wanted).max() <= 1e-6


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[RankingModel, Engine]:
    """DeepFM whose item table saw some ids, whose tag table saw none."""
    model = build_model(
        parse_model({"name": "deepfm", "embedding_dim": 3, "mlp": {"hidden": [4]}}), SMALL, EmbeddingConfig(init_std=1.0), seed=2
    ).eval()
    row = {"user": -1, "hour": 3, "item": 0, "seen": [(1 << 63) - 1, 4, None], "tags": None, "related": [MISSING_ID, -6]}
    rows = pa.RecordBatch.from_pylist([row], schema=pa.schema([(name, _type(name)) for name in COLUMNS]))
    model.embedding.prepare(Transform(SMALL).batch(rows), step=0)
    model.embedding.finish_step(0)
    out = tmp_path_factory.mktemp("bundle") / "small"
    manifest = export_bundle(model, SMALL, rows, out, model_name="small", version="1")
    assert manifest.dynamic == {"user": 1, "item": 5, "tags": 0}
    return model, Engine.load(out, "cpu")


@pytest.fixture
def copy(dynamic_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dynamic_dir, tmp_path / "copy"))


def reseal(directory: Path, **change: Any) -> None:
    """Write a manifest whose checksums fit what lies there."""
    manifest = Manifest.read(directory)
    files = {path.relative_to(directory).as_posix(): hash_file(path) for path in directory.rglob("*") if path.is_file()}
    del files["manifest.json"]
    manifest.model_copy(update={"files": files, **change}).write(directory)


def test_ids_that_do_not_rise_are_refused(copy: Path) -> None:
    file = copy / "ids" / "hour.safetensors"
    save_file({"ids": load_file(file)["ids"].flip(0).contiguous()}, file)
    reseal(copy)
    with pytest.raises(BundleError, match=r"copy: table 'hour': ids must rise strictly"):
        Engine(Bundle.load(copy), Device.resolve("cpu"))


def test_a_number_of_ids_that_is_not_the_manifests_is_refused(copy: Path) -> None:
    file = copy / "ids" / "hour.safetensors"
    save_file({"ids": load_file(file)["ids"][1:].contiguous()}, file)
    reseal(copy)
    with pytest.raises(BundleError, match=r"table 'hour' has \d+ ids, the manifest says \d+"):
        Engine(Bundle.load(copy), Device.resolve("cpu"))


def test_tables_that_are_not_the_specs_are_refused(copy: Path) -> None:
    reseal(copy, dynamic={"hour": 3})
    with pytest.raises(BundleError, match=r"ids of the tables \['hour'\], dynamic in the spec are \['city', 'hour', 'item_id'"):
        Bundle.load(copy)


def test_a_default_row_that_is_not_zero_is_refused(copy: Path) -> None:
    file = copy / "tables" / "linear.safetensors"
    save_file({"rows": load_file(file)["rows"] + 1}, file)
    reseal(copy)
    with pytest.raises(BundleError, match=r"row 0 of table 'user_id' in 'linear', which unknown ids read, is not zero"):
        Engine(Bundle.load(copy), Device.resolve("cpu"))


def test_a_damaged_list_of_ids_is_named(copy: Path) -> None:
    file = copy / "ids" / "item_id.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"ids/item_id\.safetensors: is corrupt"):
        Bundle.load(copy)
    save_file({"other": torch.zeros(1)}, file)
    reseal(copy)
    with pytest.raises(BundleError, match=r"ids/item_id\.safetensors: holds \['other'\], exactly 'ids' is needed"):
        Bundle.load(copy)
