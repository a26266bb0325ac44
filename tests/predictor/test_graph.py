"""The dense graph: the tower's scores at any size, nothing but data in the file, nothing but pure operators out of it."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.errors import BundleError
from ninerank.features.spec import FeatureSpec
from ninerank.fusion.capture import GraphInput, capture, inputs_of
from ninerank.fusion.compile import compile_graph
from ninerank.fusion.verify import draw_inputs
from ninerank.predictor.graph import DenseGraph, build_graph, describe_graph, export_graph
from ninerank.towers.config import parse_model
from ninerank.towers.registry import build_model, model_names
from ninerank.towers.sides import SidedTower

CPU = torch.device("cpu")


def sides_of(sizes: dict[str, int], inputs: list[GraphInput]) -> dict[str, Tensor]:
    return draw_inputs(inputs, sizes, torch.Generator().manual_seed(sum(sizes.values())))


def inputs_for(dims: dict[str, int]) -> list[GraphInput]:
    """Three fields and a number on either side, and a history."""
    inputs = [
        GraphInput("dense.request", "request", ("U", 1)),
        GraphInput("dense.item", "item", ("B", 1)),
        GraphInput("user_row", "joint", ("B",), torch.int64),
        GraphInput("mask.history", "request", ("U", "L.history"), torch.bool),
    ]
    for group, dim in dims.items():
        inputs.append(GraphInput(f"{group}.request", "request", ("U", 3, dim)))
        inputs.append(GraphInput(f"{group}.item", "item", ("B", 3, dim)))
        inputs.append(GraphInput(f"{group}.seq.history", "request", ("U", "L.history", dim)))
    return inputs


@pytest.mark.parametrize("name", model_names())
def test_every_model_is_exported_exactly(name: str, spec: FeatureSpec) -> None:
    mlp = {"hidden": [8, 4], "batch_norm": True, "dropout": 0.1}
    experts = {"expert": mlp, "tower": mlp}
    shapes = {"lr": {}, "fm": {}, "dlrm": {"top": mlp}, "mmoe": experts, "ple": experts}.get(name, {"mlp": mlp})
    config = parse_model({"name": name, **({} if name == "lr" else {"embedding_dim": 4}), **shapes})
    model = build_model(config, spec, EmbeddingConfig(), seed=1).eval()
    assert isinstance(model.embedding, EmbeddingCollection)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.tower.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    dims = config.groups(1)
    inputs = inputs_for(dims)
    tower = SidedTower(model.tower, tuple(dims), ["history"])
    graph = export_graph(tower, inputs)
    module = build_graph(DenseGraph(graph.text, graph.weights), CPU)
    assert inputs_of(module) == inputs
    # In double precision: products of many layers cancel, and another order of their sums is no difference of the graph.
    module, tower = module.double(), tower.double()
    with torch.inference_mode():
        for requests, rows in ((1, 1), (1, 64), (3, 2), (5, 64)):
            for length in (1, 2, 8):
                sides = sides_of({"U": requests, "B": rows, "L.history": length}, inputs)
                sides = {key: value.double() if value.is_floating_point() else value for key, value in sides.items()}
                scores = torch.sigmoid(module(*sides.values()))
                assert scores.dtype == torch.float64
                assert (scores - torch.sigmoid(tower(sides))).abs().max() <= 1e-10


def test_a_graph_that_was_read_is_written_as_it_was(spec: FeatureSpec) -> None:
    model = build_model(parse_model({"name": "dcnv2", "embedding_dim": 4}), spec, EmbeddingConfig(), seed=1).eval()
    compiled = compile_graph(capture(SidedTower(model.tower, ["deep"], ["history"]), inputs_for({"deep": 4})))
    graph = describe_graph(compiled.module)
    again = describe_graph(build_graph(graph, CPU))
    assert again.text == graph.text
    assert again.weights.keys() == graph.weights.keys()
    assert all(torch.equal(value, graph.weights[name]) for name, value in again.weights.items())


class Odd(nn.Module):
    """Constants, symbolic sizes, in-place writes, infinities, a buffer outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]), persistent=False)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x = torch.relu_(self.linear(inputs["dense"]))[:, self.order] * self.scale
        rows = x.shape[0]
        noise = torch.zeros(rows, 2 * 2, device=x.device)
        noise[:, 0] = inputs["deep.seq.h"].shape[1]
        weight = inputs["deep.seq.h"].sum(2).masked_fill(~inputs["mask.h"], float("-inf")).softmax(1).nan_to_num(0.0)
        return (x + noise.view(rows, -1).to(x.dtype)).sum(1, keepdim=True) + torch.einsum("bl,bld->b", weight, inputs["deep.seq.h"])[
            :, None
        ]


ODD_INPUTS = [
    GraphInput("dense", "item", ("B", 4)),
    GraphInput("deep.seq.h", "item", ("B", "L.h", 3)),
    GraphInput("mask.h", "item", ("B", "L.h"), torch.bool),
]


def odd_inputs(rows: int, length: int) -> dict[str, Tensor]:
    return {"dense": torch.randn(rows, 4), "deep.seq.h": torch.randn(rows, length, 3), "mask.h": torch.ones(rows, length, dtype=torch.bool)}


def test_constants_sizes_and_writes_in_place_survive() -> None:
    tower = Odd().eval()
    graph = export_graph(tower, ODD_INPUTS)
    module = build_graph(graph, CPU)
    for rows, length in ((1, 1), (5, 1), (1, 6), (33, 4)):
        inputs = odd_inputs(rows, length)
        with torch.inference_mode():
            assert torch.equal(module(*inputs.values()), tower(inputs))


def test_the_file_holds_no_paths_and_no_code() -> None:
    text = export_graph(Odd().eval(), ODD_INPUTS).text
    assert ".py" not in text
    assert "/" not in text
    assert {node["op"].partition(".")[0] for node in json.loads(text)["nodes"]} <= {"aten", "operator", "torch"}


class Branching(nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        if inputs["dense"].sum() > 0:
            return inputs["dense"]
        return -inputs["dense"]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return inputs["dense"] * self.calls


@pytest.mark.parametrize(("tower", "message"), [(Branching(), "cannot take tower Branching"), (Counting(), "changes its own state")])
def test_towers_that_are_no_graph_are_refused(tower: nn.Module, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        export_graph(tower, ODD_INPUTS[:1])


def node(op: str, *args: Any, name: str = "n", **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "args": list(args), "kwargs": kwargs}


X = {"input": "dense"}
ITEM = {"name": "dense", "role": "item", "dims": ["B"], "dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has format 1, this version reads 2"),
        ({"inputs": ["dense"]}, "malformed"),
        ({"inputs": [{**ITEM, "role": "driver"}]}, "is no input"),
        ({"inputs": [{**ITEM, "dtype": "load"}]}, "is no input"),
        ({"inputs": [{**ITEM, "dims": [-1]}]}, "is no input"),
        ({"inputs": [{"name": "dense"}]}, "malformed"),
        ({"nodes": [node("aten.relu.default", {"weight": 'a"); import os; ("'})]}, "is no name of a weight"),
        ({"nodes": [node("torch.load", "/etc/passwd")]}, "operator 'torch.load' is unknown here or not allowed"),
        ({"nodes": [node("aten.from_file.default", "/etc/passwd")]}, "not allowed"),
        ({"nodes": [node("aten.add_.Tensor", X, X)]}, "not allowed"),
        ({"nodes": [node("aten.__class__.__init__", X)]}, "not allowed"),
        ({"nodes": [node("os.system", "true")]}, "not allowed"),
        ({"nodes": [node("operator.attrgetter", "x")]}, "not allowed"),
        ({"nodes": [node("aten.relu.default", X, name="a); import os; (b")]}, "is no name of a node"),
        ({"nodes": [node("aten.relu.default", X, **{"a=1, b": 1})]}, "is no name of a node or an argument"),
        ({"nodes": [node("aten.relu.default", {"ref": "later"})]}, "malformed"),
        ({"nodes": [node("aten.relu.default", {"weight": "missing"})]}, "malformed"),
        ({"nodes": [node("aten.to.dtype", X, {"dtype": "load"})]}, "'load' is no dtype"),
        ({"nodes": [node("aten.relu.default", {"input": "dense", "ref": "x"})]}, "malformed"),
        ({"nodes": "x"}, "malformed"),
        ({"output": {"ref": "nothing"}}, "malformed"),
    ],
)
def test_files_that_ask_for_more_are_refused(change: dict[str, Any], message: str) -> None:
    sound = {"format": 2, "inputs": [ITEM], "nodes": [node("aten.relu.default", X)], "output": {"ref": "n"}}
    assert build_graph(DenseGraph(json.dumps(sound), {}), CPU)(torch.tensor([-1.0])).item() == 0
    with pytest.raises(BundleError, match=message):
        build_graph(DenseGraph(json.dumps({**sound, **change}), {}), CPU)


def test_weights_may_have_names_that_are_words_of_python() -> None:
    nodes = [node("aten.add.Tensor", {"weight": "mlp.0.in"}, {"weight": "mlp.0"})]
    text = json.dumps({"format": 2, "inputs": [ITEM], "nodes": nodes, "output": {"ref": "n"}})
    weights = {"mlp.0.in": torch.tensor([1.0]), "mlp.0": torch.tensor([2.0])}
    assert build_graph(DenseGraph(text, weights), CPU)(torch.zeros(1)).item() == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000])
def test_text_that_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="dense graph"):
        build_graph(DenseGraph(text, {}), CPU)
