"""`ninerank fuse`: figures that are the manifest's, a page with both graphs that is well-formed."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.evaluation.fusion import FusionReport, fusion_page, fusion_report
from ninerank.evaluation.graphs import graph_svg
from ninerank.fusion.capture import inputs_of
from ninerank.fusion.compile import PassRecord
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model
from ninerank.training.run import Run


@pytest.fixture(scope="module")
def bundle_dir(run: Run, log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model that is large enough for splits to pay."""
    config = parse_model({"name": "deepfm", "embedding_dim": 16, "mlp": {"hidden": [128], "batch_norm": True}})
    model = build_model(config, run.spec, EmbeddingConfig(), seed=1).eval()
    golden = pq.read_table(log_dir / "test.parquet").slice(0, 32).combine_chunks().to_batches()[0]
    out = tmp_path_factory.mktemp("bundles") / "larger"
    export_bundle(model, run.spec, golden, out, model_name="larger", version="3")
    return out


@pytest.fixture(scope="module")
def report(bundle_dir: Path) -> FusionReport:
    return fusion_report(Bundle.load(bundle_dir))


def test_figures_are_the_manifests(report: FusionReport, bundle_dir: Path) -> None:
    manifest = Bundle.load(bundle_dir).manifest
    found = report.as_dict()
    assert found["before"]["flops"] == manifest.graph_before.flops > found["after"]["flops"] == manifest.graph_after.flops
    assert [PassRecord.model_validate(record) for record in found["passes"]] == list(manifest.passes)
    assert {"linears", "concats"} <= {record["name"] for record in found["passes"] if record["fired"]}
    assert found["largest_difference"] <= 1e-6
    assert found["before"]["milliseconds"] > 0


def test_a_drawing_has_a_box_for_every_value(report: FusionReport) -> None:
    for module in (report.source, report.compiled):
        svg = graph_svg(module, "a <graph>")
        root = ET.fromstring(svg)
        boxes = root.findall("g")
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        assert len(boxes) == len(calls) + sum(given.name != "user_row" for given in inputs_of(module))
        _, _, width, height = map(float, str(root.get("viewBox")).split())
        places = set()
        for box in boxes:
            rect = box.find("rect")
            assert rect is not None
            x, y, wide, high = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
            assert 0 <= x <= width - wide + 1
            assert 0 <= y <= height - high + 1
            places.add((x, y))
        assert len(places) == len(boxes)
        rows: dict[float, list[float]] = {}
        for x, y in places:
            rows.setdefault(y, []).append(x)
        assert all(b - a >= 124 for row in rows.values() for a, b in zip(sorted(row), sorted(row)[1:], strict=False))


def test_the_page_says_what_happened(report: FusionReport) -> None:
    html = fusion_page(report)
    for record in report.records:
        assert f"<td>{record.name}</td>" in html
    assert html.count("<svg") == 2
    assert "repeat rows" in html
    assert "<script" not in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg)


def test_the_command_writes_page_and_figures(bundle_dir: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "out.html", tmp_path / "out.json"
    result = CliRunner().invoke(build("fuse"), ["fuse", str(bundle_dir), "--report", str(page), "--out", str(figures)])
    assert result.exit_code == 0, result.output
    assert "linears" in result.output
    assert "before:" in result.output
    assert page.read_text().startswith("<!doctype html>")
    printed = CliRunner().invoke(build("fuse"), ["fuse", str(bundle_dir), "--json"])
    assert json.loads(printed.output)["passes"] == json.loads(figures.read_text())["passes"]
