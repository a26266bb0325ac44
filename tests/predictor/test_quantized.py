"""Bundles with tables in fewer bits: smaller, mapped, within what they say of themselves, and held to it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from ninerank.device import Device
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.quantize import TableDtype, error_bound
from ninerank.errors import BundleError, SpecError
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.predictor import bundle as module
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.predictor.engine import Engine
from ninerank.predictor.manifest import Manifest
from ninerank.towers.model import RankingModel

Rows = Callable[..., pa.RecordBatch]
DTYPES: tuple[TableDtype, ...] = ("fp16", "int8", "int4")
DIM = 64


class Tower(torch.nn.Module):
    """Logits that are smooth in every embedding, so that a bound on rows gives one on scores."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["deep"].sum((1, 2))[:, None] / DIM + inputs["linear"].sum(1) + inputs["deep.seq.history"].mean((1, 2))[:, None]


@pytest.fixture(scope="module")
def wide(spec: FeatureSpec) -> RankingModel:
    return RankingModel(EmbeddingCollection(spec, {"deep": DIM, "linear": 1}, EmbeddingConfig(init_std=0.3), seed=1), Tower()).eval()


@pytest.fixture(scope="module", params=DTYPES)
def exported(
    request: pytest.FixtureRequest, wide: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TableDtype, Path, Manifest]:
    out = tmp_path_factory.mktemp("quantized") / "bundle"
    return request.param, out, export_bundle(wide, spec, log_rows(64), out, model_name="wide", version="1", tables=request.param)


def test_tables_are_smaller_by_what_their_rows_are(exported: tuple[TableDtype, Path, Manifest], wide: RankingModel) -> None:
    dtype, out, manifest = exported
    row_bytes = {"fp16": 128, "int8": 72, "int4": 40}[dtype]
    num_rows = wide.embedding.layout.total_rows
    header = 100
    assert num_rows * row_bytes <= manifest.files["tables/deep.safetensors"].size_bytes <= num_rows * row_bytes + header
    assert manifest.table_dtypes == {"deep": dtype, "linear": "fp16"}
    assert Manifest.read(out) == manifest


def test_scores_are_those_of_the_trained_model_within_the_bound(
    exported: tuple[TableDtype, Path, Manifest], wide: RankingModel, spec: FeatureSpec, log_rows: Rows
) -> None:
    dtype, out, manifest = exported
    rows = log_rows(500, seed=9)
    with torch.inference_mode():
        want = torch.sigmoid(wide(Transform(spec).batch(rows, labels=False))).numpy()
    difference = float(np.abs(Engine.load(out, "cpu").score(rows) - want).max())
    groups = dict(wide.embedding.named_groups())
    row_error = {
        name: float(error_bound(group.storage.amin(1), group.storage.amax(1), kind).max())
        for (name, group), kind in zip(groups.items(), (dtype, "fp16"), strict=True)
    }
    # 6 pooled fields, one of them a bag of several rows, and a history; the sigmoid is at most a quarter as steep.
    most_rows = 5 + 12 + 1
    bound = (most_rows * row_error["deep"] + most_rows * row_error["linear"]) / 4 + 1e-5
    assert 0 < difference <= bound
    assert 0 < manifest.golden_difference <= bound


def test_it_is_held_to_the_difference_seen_at_export(exported: tuple[TableDtype, Path, Manifest], caplog: pytest.LogCaptureFixture) -> None:
    _, out, manifest = exported
    assert manifest.golden_tolerance == pytest.approx(manifest.golden_difference + 1e-5)
    bundle = Bundle.load(out)
    engine = Engine(bundle, Device.resolve("cpu"))
    assert engine.check_golden(bundle) == pytest.approx(manifest.golden_difference, abs=1e-6)
    worn = {**bundle.tables, "deep": torch.roll(bundle.tables["deep"], 1, 0)}
    with pytest.raises(BundleError, match=r"golden scores of wide 1 differ by .* on cpu, at most .* is allowed"):
        Engine(dataclasses.replace(bundle, tables=worn), Device.resolve("cpu")).check_golden(bundle)


def test_tables_stay_mapped(exported: tuple[TableDtype, Path, Manifest]) -> None:
    _, out, _ = exported
    bundle = Bundle.load(out)
    engine = Engine(bundle, Device.resolve("cpu"))
    (storage,) = (group.storage for name, group in engine._embedding.named_groups() if name == "deep")
    assert storage.data_ptr() == bundle.tables["deep"].data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert f"{out}/tables/deep.safetensors" in maps.read_text()


@pytest.mark.parametrize("change", [{"deep": "fp32"}, {"deep": "int2"}, {}])
def test_a_type_that_the_file_does_not_have_is_refused(exported: tuple[TableDtype, Path, Manifest], change: dict[str, str]) -> None:
    _, out, manifest = exported
    bundle = dataclasses.replace(Bundle.load(out), manifest=manifest.model_copy(update={"table_dtypes": change}))
    with pytest.raises(BundleError, match=r"tables of 'deep'|no table type 'int2'"):
        Engine(bundle, Device.resolve("cpu"))


def test_too_large_a_difference_is_refused_at_export(
    wide: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.MOST_DIFFERENCE, "int4", 1e-6)
    with pytest.raises(BundleError, match=r"golden scores of wide 1 differ by .*, at most 1e-06 is allowed; .* too coarse"):
        export_bundle(wide, spec, log_rows(64), tmp_path / "out", model_name="wide", version="1", tables="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tables", ["fp32", "int8"])
def test_a_table_that_is_not_finite_is_named(wide: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path, tables: str) -> None:
    group = dict(wide.embedding.named_groups())["deep"]
    place = group.layout.rows_of("city").start + 7
    kept = float(group.storage.detach()[place, 3])
    group.storage.detach()[place, 3] = float("inf")
    try:
        with pytest.raises(BundleError, match=r"group 'deep', table 'city': row 7, column 3 is inf; .*; the model is not exported"):
            export_bundle(wide, spec, log_rows(8), tmp_path / "out", model_name="wide", version="1", tables=tables)
    finally:
        group.storage.detach()[place, 3] = kept
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_names_the_nearest(wide: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no table type 'int16'; did you mean"):
        export_bundle(wide, spec, log_rows(8), tmp_path / "out", model_name="wide", version="1", tables="int16")


def test_a_bundle_from_before_reads_as_fp32(bundle_dir: Path) -> None:
    content = json.loads((bundle_dir / "manifest.json").read_text())
    assert content["table_dtypes"] == {"deep": "fp32", "linear": "fp32"}
    bundle = Bundle.load(bundle_dir)
    older = bundle.manifest.model_copy(update={"table_dtypes": {}})
    Engine(dataclasses.replace(bundle, manifest=older), Device.resolve("cpu")).check_golden(bundle)
