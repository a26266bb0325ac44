"""Two places on one bundle: what agrees passes, and a planted defect is named at its layer, whatever the backend made of the graph."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ninerank.cli.main import build
from ninerank.embedding.collection import EmbeddingConfig
from ninerank.errors import DeviceError
from ninerank.evaluation import layers
from ninerank.evaluation.differences import difference
from ninerank.evaluation.layerreport import Budget, LayerReport
from ninerank.evaluation.layers import compare_bundle, compare_places
from ninerank.evaluation.place import Place, PlacedBundle
from ninerank.features.draw import draw_batch
from ninerank.fusion import backends
from ninerank.predictor.bundle import Bundle, export_bundle
from ninerank.predictor.graph import DenseGraph
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model
from ninerank.training.run import Run

needs_bf16 = pytest.mark.skipif(not backends.multiplies_bf16(), reason="this CPU has neither AMX nor AVX512-bf16")
CPU = Place.parse("cpu")
SIDES = ["cpu", "cpu:eager", pytest.param("cpu:bf16", marks=needs_bf16)]


@pytest.fixture(scope="module")
def bundle(run: Run, log_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with hidden layers that are packed, of weights large enough to count."""
    config = parse_model({"name": "deepfm", "embedding_dim": 16, "mlp": {"hidden": [64, 32]}})
    model = build_model(config, run.spec, EmbeddingConfig(), seed=1).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=draw)
    golden = pq.read_table(log_dir / "test.parquet").slice(0, 24).combine_chunks().to_batches()[0]
    out = tmp_path_factory.mktemp("bundles") / "layered"
    export_bundle(model, run.spec, golden, out, model_name="layered", version="1")
    return Bundle.load(out)


def compare(bundle: Bundle, other: Bundle, place: str) -> LayerReport:
    """`cpu` on the bundle against `place` on another that is like it."""
    batches = {"random": draw_batch(bundle.spec, 20, torch.Generator().manual_seed(1), num_requests=3)}
    batches["one request"] = draw_batch(bundle.spec, 20, torch.Generator().manual_seed(2), num_requests=1)
    return compare_places(bundle, (PlacedBundle(bundle, CPU), PlacedBundle(other, Place.parse(place))), batches)


def with_weight(bundle: Bundle, name: str) -> Bundle:
    """The bundle with one number of a weight changed."""
    weight = bundle.graph.weights[name].clone()
    weight.view(-1)[3] += 1.0
    return replace(bundle, graph=DenseGraph(bundle.graph.text, {**bundle.graph.weights, name: weight}))


def mlp_weights(bundle: Bundle) -> list[str]:
    names = [name for name in bundle.graph.weights if name.startswith("mlp") and name.endswith("weight")]
    assert len(names) >= 2
    return names


@pytest.mark.parametrize("place", SIDES)
def test_what_is_right_passes(bundle: Bundle, place: str) -> None:
    found = compare_bundle(bundle, (CPU, Place.parse(place)))
    assert found.passed, found.verdict
    assert found.batches == ("golden rows", "golden request", "random 1", "random 2")
    assert {"deep.request", "deep.item", "linear.item"} <= {layer.name for layer in found.layers if layer.operator == "lookup"}
    largest = max(layer.own.relative for layer in found.layers)
    assert largest == 0 if place == "cpu" else largest <= found.budget.layer
    if place == "cpu:bf16":
        assert largest > 1e-4
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["first_divergent"] is None


@pytest.mark.parametrize("place", SIDES)
def test_a_changed_weight_is_named_at_its_layer(bundle: Bundle, place: str) -> None:
    for name in mlp_weights(bundle):
        found = compare(bundle, with_weight(bundle, name), place)
        assert not found.passed
        assert found.first is not None
        assert name in found.first.weights, found.verdict
        assert name in found.verdict
        later = [layer for layer in found.layers if layer.own.relative > layer.allowed]
        assert later == [found.first], "layers that start from right values are right themselves"


@pytest.mark.parametrize("place", SIDES)
def test_a_replaced_operator_is_named(bundle: Bundle, place: str) -> None:
    nodes = json.loads(bundle.graph.text)["nodes"]
    last = [node["name"] for node in nodes if node["op"] == "aten.relu.default"][-1]
    text = json.dumps(
        json.loads(bundle.graph.text) | {"nodes": [n | {"op": "aten.tanh.default"} if n["name"] == last else n for n in nodes]}
    )
    found = compare(bundle, replace(bundle, graph=DenseGraph(text, bundle.graph.weights)), place)
    assert found.first is not None
    assert found.first.name == last, found.verdict


def test_tables_in_8_bits_are_compared_by_the_kernel_asked_for(bundle: Bundle, run: Run, tmp_path: Path) -> None:
    model = build_model(parse_model({"name": "dnn", "embedding_dim": 16, "mlp": {"hidden": [32]}}), run.spec, EmbeddingConfig(), seed=1)
    export_bundle(model.eval(), run.spec, bundle.golden.rows, tmp_path / "int8", model_name="int8", version="1", tables="int8")
    found = compare_bundle(Bundle.load(tmp_path / "int8"), (CPU, Place.parse("cpu:torch")))
    assert found.passed, found.verdict
    assert [set(kernels) for kernels in found.kernels] == [
        {"embedding_rows: numba", "quantized_rows: numba"},
        {"embedding_rows: torch", "quantized_rows: torch"},
    ]


def test_changed_rows_are_named_at_the_lookup(bundle: Bundle) -> None:
    rows_VD = bundle.tables["deep"].clone()
    rows_VD[5:] *= 1.01
    found = compare(bundle, replace(bundle, tables={**bundle.tables, "deep": rows_VD}), "cpu")
    assert found.first is not None
    assert (found.first.name, found.first.operator) == ("deep.request", "lookup")


def test_a_backend_that_runs_another_graph_is_named(bundle: Bundle) -> None:
    other = PlacedBundle(bundle, Place.parse("cpu:eager"))
    run = other.runner._run
    other.runner._run = lambda *inputs: run(*inputs) + 0.01
    batch = draw_batch(bundle.spec, 20, torch.Generator().manual_seed(1), num_requests=3)
    found = compare_places(bundle, (PlacedBundle(bundle, CPU), other), {"random": batch})
    assert not found.passed
    assert found.first is None
    assert found.verdict.startswith("cpu:eager: scores of its backend differ by 0.00"), found.verdict


def test_small_differences_that_add_up_are_told(bundle: Bundle) -> None:
    batch = draw_batch(bundle.spec, 20, torch.Generator().manual_seed(1), num_requests=3)
    sides = (PlacedBundle(bundle, CPU), PlacedBundle(with_weight(bundle, mlp_weights(bundle)[0]), CPU))
    found = compare_places(bundle, sides, {"random": batch}, budget=Budget(layer=1e9, score=1e-5))
    assert not found.passed
    assert "no layer alone goes beyond its budget" in found.verdict


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.data())
def test_differences(values: list[float], data: st.DataObject) -> None:
    first = torch.tensor(values)
    assert difference(first, first.clone()).absolute == 0
    place = data.draw(st.integers(0, len(values) - 1))
    second = first.clone()
    second[place] = data.draw(FLOATS)
    found = difference(first, second)
    mine, theirs = float(first[place]), float(second[place])
    if mine == theirs or (mine != mine and theirs != theirs):
        assert found.absolute == found.relative == 0
    elif abs(mine) < float("inf") and abs(theirs) < float("inf"):
        assert found.absolute == abs(mine - theirs)
        assert 0 < found.relative <= abs(mine - theirs) / 1e-6
    else:
        assert found.absolute == found.relative == float("inf")


def test_results_of_other_shapes_types_or_values_differ() -> None:
    ones = torch.ones(2, 3)
    for other in (torch.ones(3, 2), torch.ones(2, 3, dtype=torch.int64), (ones,), torch.full((2, 3), float("nan"))):
        assert difference(ones, other).relative == float("inf")
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])).absolute == float("inf")
    assert difference((ones, 4), (ones, 4)).absolute == 0
    assert difference((ones, 4), (ones, 5)).absolute == float("inf")
    assert difference(torch.tensor([-1e9, 1.0]), torch.tensor([-1e9, 1.5])).relative == 0.5, "beside a mask"


def run_cli(*arguments: object) -> tuple[int, str]:
    outcome = CliRunner().invoke(build("parity"), ["parity", *map(str, arguments)])
    assert outcome.exception is None or isinstance(outcome.exception, (SystemExit, DeviceError)), outcome.exception
    return outcome.exit_code, outcome.stdout or outcome.output


def test_the_command_passes_and_fails(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "parity.json"
    code, text = run_cli("--device", "cpu", "--device", "cpu:eager", "--random", 1, "--out", out, bundle.directory)
    assert code == 0, text
    assert "PASS: cpu:eager agrees with cpu" in text
    written = json.loads(out.read_text())
    assert written["batches"] == ["golden rows", "golden request", "random 1"]

    def spoiled(own: Bundle, place: Place) -> PlacedBundle:
        return PlacedBundle(own if place == CPU else with_weight(own, mlp_weights(own)[0]), place)

    monkeypatch.setattr(layers, "PlacedBundle", spoiled)
    code, text = run_cli("--device", "cpu", "--device", "cpu:eager", "--json", bundle.directory)
    found = json.loads(text)
    assert (code, found["passed"]) == (1, False)
    (wrong,) = (layer for layer in found["layers"] if not layer["passed"])
    assert wrong["name"] == found["first_divergent"]
    assert mlp_weights(bundle)[0] in wrong["weights"]
    code, text = run_cli("--device", "cpu", "--device", "cpu:eager", "--layer-budget", 10, "--score-budget", 1, bundle.directory)
    assert code == 0, text


def test_triton_interpreted_gives_the_same_layers(bundle_dir: Path, tmp_path: Path) -> None:
    """In a process of its own: Triton reads its setting when it is loaded."""
    out = tmp_path / "parity.json"
    arguments = ["--device", "cpu", "--device", "cpu:interpreter", "--random", "1", "--out", str(out), str(bundle_dir)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ninerank", "parity", *arguments]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    mine, interpreted = json.loads(out.read_text())["kernels"]
    assert any(name.startswith("embedding_bag: numba") for name in mine)
    assert any(name.startswith("embedding_bag: triton") for name in interpreted)
    assert {name for name in interpreted if "numba" in name} <= {"embedding_rows: numba"}, "ids are checked on the host"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu:fp17", "unknown 'fp17'; valid: .*eager.*fp32"),
        ("cpu:egaer", "did you mean 'eager'"),
        ("cpu:bf16:fp32", "names the precision twice, 'bf16' and 'fp32'"),
        ("cpu:", "unknown ''"),
    ],
)
def test_a_place_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        Place.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu:0", "device 'cpu:0': is none of"),
        ("cpu:triton", "no kernel 'triton' runs on cpu; valid: interpreter, numba, torch"),
        ("cpu:interpreter", "start this process with TRITON_INTERPRET=1"),
        ("cpu:eager:bf16", "precision 'bf16' needs backend 'script'"),
    ],
)
def test_a_place_that_cannot_run_is_refused(bundle: Bundle, text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "triton", sys.modules.get("triton", sys))
    with pytest.raises(DeviceError, match=said):
        PlacedBundle(bundle, Place.parse(text))


def test_wrong_usage_is_one_line(bundle: Bundle) -> None:
    for arguments in ((), ("--device", "cpu"), ("--device", "cpu") * 3):
        code, text = run_cli(*arguments, bundle.directory)
        assert code == 2
        assert "give it twice" in text
