"""A bundle is whole or it is refused: every file, every byte, the digest and the golden scores."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import BundleError
from ninerank.features.spec import FeatureSpec
from ninerank.features.transform import Transform
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.predictor.engine import Engine
from ninerank.towers.config import parse_model
from ninerank.towers.model import RankingModel
from ninerank.towers.registry import build_model

Rows = Callable[..., pa.RecordBatch]
FILES = [
    "golden.parquet",
    "graph.json",
    "source.json",
    "source.safetensors",
    "spec.json",
    "tables/deep.safetensors",
    "tables/linear.safetensors",
    "weights.safetensors",
]


@pytest.fixture
def copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


def reseal(directory: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Write a manifest whose checksums fit what lies there, as somebody who wants to deceive would."""
    content = json.loads((directory / "manifest.json").read_text())
    del content["digest"]
    for name, entry in content["files"].items():
        if (directory / name).is_file():
            data = (directory / name).read_bytes()
            entry.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    (directory / "manifest.json").write_text(json.dumps({**content, "digest": hashlib.sha256(text.encode()).hexdigest()}))


def test_it_holds_what_was_exported(bundle_dir: Path, spec: FeatureSpec, model: RankingModel) -> None:
    bundle = Bundle.load(bundle_dir)
    manifest = bundle.manifest
    assert (manifest.model_name, manifest.model_version, manifest.tasks) == ("small", "7", ("click",))
    assert manifest.spec_digest == spec.digest == bundle.spec.digest
    assert sorted(manifest.files) == FILES
    assert {"ninerank", "python", "torch"} <= manifest.versions.keys()
    for name, group in model.embedding.named_groups():
        assert torch.equal(bundle.tables[name], group.storage)
    assert bundle.golden.scores_BT.shape == (64, 1)
    assert {path.stat().st_mode & 0o777 for path in bundle_dir.rglob("*") if path.is_file()} == {0o644}


def test_nothing_is_left_beside_it(bundle_dir: Path) -> None:
    assert [path.name for path in bundle_dir.parent.iterdir()] == [bundle_dir.name]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["first byte", "middle byte", "last byte", "cut", "longer", "gone", "link"])
def test_every_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    file = copy / name
    data = bytearray(file.read_bytes())
    if damage.endswith("byte"):
        place = {"first": 0, "middle": len(data) // 2, "last": len(data) - 2 if name == "manifest.json" else len(data) - 1}
        data[place[damage.partition(" ")[0]]] ^= 0x55
    file.unlink()
    if damage == "link":
        (copy.parent / "elsewhere").write_bytes(data)
        file.symlink_to(copy.parent / "elsewhere")
    elif damage != "gone":
        file.write_bytes({"cut": data[:-3], "longer": data + b"x"}.get(damage, data))
    with pytest.raises(BundleError, match="manifest" if name == "manifest.json" else name.replace(".", r"\.")):
        Bundle.load(copy)


@pytest.mark.parametrize("name", ["extra.bin", "tables/more.safetensors", ".hidden", "deep/er/file"])
def test_a_file_that_is_not_listed_is_named(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=rf"{name}: is not listed"):
        Bundle.load(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "tables/../../x", "c:\\x", "", "a//b", "manifest.json"])
def test_paths_out_of_the_bundle_are_refused(copy: Path, name: str) -> None:
    reseal(copy, lambda content: content["files"].update({name: {"sha256": "0" * 64, "size_bytes": 1}}))
    with pytest.raises(BundleError, match="is no path of a file inside a bundle"):
        Bundle.load(copy)


def test_another_specs_digest_is_refused(copy: Path, spec: FeatureSpec) -> None:
    changed = json.loads((copy / "spec.json").read_text())
    changed["features"][0]["encoding"]["seed"] = 9
    (copy / "spec.json").write_text(json.dumps(changed))
    reseal(copy)
    digest = FeatureSpec.parse(changed, "spec").digest
    with pytest.raises(BundleError, match=f"has digest {digest}, the bundle was made for {spec.digest}"):
        Bundle.load(copy)


def test_golden_scores_that_are_not_met_keep_it_from_being_served(copy: Path) -> None:
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    values = np.frombuffer(weights, np.uint8).copy()
    values[-40:] ^= 0x10
    (copy / "weights.safetensors").write_bytes(values.tobytes())
    reseal(copy)
    Bundle.load(copy)
    with pytest.raises(BundleError, match="golden scores"):
        Engine.load(copy, device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("spec.json", b"{}"),
        ("spec.json", b"\xff"),
        ("golden.parquet", b"PAR1 no PAR1"),
        ("weights.safetensors", b"12345678"),
        ("tables/deep.safetensors", b"\xff" * 64),
        ("graph.json", b"\xff\xfe"),
    ],
)
def test_sealed_nonsense_is_named(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    reseal(copy)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has bundle format 1, this version reads 2; export the model again"),
        ({"format": 99}, "has bundle format 99, this version reads 2"),
        ({"model_version": "../x"}, "model_version"),
        ({"groups": "deep"}, "groups"),
        ({"surprise": 1}, "surprise"),
        ({"golden_tolerance": float("inf")}, "golden_tolerance"),
    ],
)
def test_manifests_that_say_something_else_are_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    reseal(copy, lambda content: content.update(change))
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


def test_a_place_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no directory"):
        Bundle.load(tmp_path / "missing")
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        Bundle.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(BundleError, match="holds list at the top"):
        Bundle.load(tmp_path)


def test_export_never_overwrites_and_leaves_nothing_when_it_fails(
    model: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="exists already"):
        export_bundle(model, spec, log_rows(3), bundle_dir, model_name="small", version="8")
    with pytest.raises(BundleError, match="at least one golden row"):
        export_bundle(model, spec, log_rows(0), tmp_path / "a", model_name="small", version="8")
    with pytest.raises(BundleError, match="lack the columns tags, city"):
        export_bundle(model, spec, log_rows(3).drop_columns(["tags", "city"]), tmp_path / "a", model_name="small", version="8")
    with pytest.raises(BundleError, match="model version '1/2': at most 100 letters"):
        export_bundle(model, spec, log_rows(3), tmp_path / "a", model_name="small", version="1/2")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "score", lambda self, rows: np.zeros((rows.num_rows, 1), np.float32))
        with pytest.raises(BundleError, match="golden scores of small 8 differ"):
            export_bundle(model, spec, log_rows(3), tmp_path / "a", model_name="small", version="8")
    assert list(tmp_path.iterdir()) == []


def test_a_model_trained_on_jagged_histories_is_served_padded(spec: FeatureSpec, log_rows: Rows, tmp_path: Path) -> None:
    config = EmbeddingConfig(init_std=1.0, sequence_length="jagged")
    model = build_model(parse_model({"name": "din", "embedding_dim": 4}), spec, config, seed=1)
    rows, batches = log_rows(20), Transform(spec)
    manifest = export_bundle(model, spec, rows, tmp_path / "din", model_name="din", version="1")
    assert manifest.sequence_length == "longest"
    assert manifest.golden_difference < 1e-6
    model.eval()
    with torch.inference_mode():
        jagged, padded = model(batches.batch(rows)), model.tower(model.embedding(batches.batch(rows), pad=True))
    torch.testing.assert_close(jagged, padded, atol=1e-5, rtol=1e-5)


def test_export_gives_the_model_back_as_it_was(model: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path) -> None:
    model.train()
    try:
        told: list[str] = []
        export_bundle(model, spec, log_rows(3), tmp_path / "a", model_name="small", version="8", progress=told.append)
        assert model.training
        assert model.tower.training
        assert len(told) == 5
    finally:
        model.eval()
    Engine.load(tmp_path / "a", device="cpu")
