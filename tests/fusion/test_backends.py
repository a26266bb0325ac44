"""Every backend gives the scores of the module, for any number of requests, rows and ids of a history, in fp32 and bf16."""

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from ninerank.errors import BundleError, DeviceError
from ninerank.fusion import backends
from ninerank.fusion.backends import onednn
from ninerank.fusion.backends.copies import stands_for
from ninerank.fusion.backends.script import script
from ninerank.fusion.capture import REQUESTS, ROWS, GraphInput, capture
from ninerank.fusion.compile import compile_graph
from ninerank.fusion.single import single_request

CPU = torch.device("cpu")


class Split(nn.Module):
    """A first layer in two halves, an activation, sizes computed from inputs, a history, a logit."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(24, 32), nn.Linear(40, 32, bias=False)
        self.hidden, self.out = nn.Linear(32 + 8, 32), nn.Linear(32, 1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        history_BLD = inputs["history"]
        first = torch.relu(self.item(inputs["item"]) + self.user(inputs["user"]).index_select(0, inputs["user_row"]))
        pooled = (history_BLD * (history_BLD.shape[1] + 1)).sum(1) / 7.0
        logits_BT: Tensor = self.out(torch.sigmoid(self.hidden(torch.cat([first, pooled], dim=1)))).clamp(max=float("inf"))
        return logits_BT


INPUTS = (
    GraphInput("user", "request", (REQUESTS, 24)),
    GraphInput("item", "item", (ROWS, 40)),
    GraphInput("history", "item", (ROWS, "L", 8)),
    GraphInput("user_row", "joint", (ROWS,), torch.int64),
)


def inputs(requests: int, rows: int, length: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(requests + 10 * rows + length)
    user, item, history = (torch.randn(shape, generator=draw) for shape in ((requests, 24), (rows, 40), (rows, length, 8)))
    return user, item, history, torch.randint(0, requests, (rows,), generator=draw)


def scores(module: nn.Module, values: tuple[Tensor, ...]) -> Tensor:
    out: Tensor = module({given.name: value for given, value in zip(INPUTS, values, strict=True)})
    return out


@pytest.fixture(scope="module")
def exported() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    module = Split().eval()
    return module, capture(module, INPUTS)


SHAPES = [(1, 1, 1), (1, 7, 3), (3, 7, 2), (5, 300, 9)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Inductor's own modules, when the first shape is compiled
@pytest.mark.parametrize("name", ["script", "eager", "openvino", pytest.param("inductor", marks=pytest.mark.slow)])  # compiles C++
def test_backends_give_the_modules_scores(exported: tuple[nn.Module, fx.GraphModule], name: str) -> None:
    module, graph = exported
    if name == "openvino":
        pytest.importorskip("openvino")
    run = backends.lower(graph, CPU, one=single_request(graph), backend=name)
    for shape in SHAPES:
        with torch.inference_mode():
            torch.testing.assert_close(run(*inputs(*shape)), scores(module, inputs(*shape)), rtol=1e-5, atol=1e-6)


needs_bf16 = pytest.mark.skipif(not backends.multiplies_bf16(), reason="this CPU has neither AMX nor AVX512-bf16")


@needs_bf16
def test_openvino_runs_bf16_from_several_threads_at_once(exported: tuple[nn.Module, fx.GraphModule]) -> None:
    pytest.importorskip("openvino")
    module, graph = exported
    run = backends.lower(graph, CPU, one=single_request(graph), backend="openvino", precision="bf16")
    differences: list[float] = []

    def work(requests: int) -> None:
        with torch.inference_mode():
            for rows in range(1, 30):
                values = inputs(requests, rows, 4)
                differences.append(float((torch.sigmoid(run(*values)) - torch.sigmoid(scores(module, values))).abs().max()))

    threads = [threading.Thread(target=work, args=(requests,)) for requests in (1, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 3 * 29
    assert 1e-7 < max(differences) < 1e-2


def test_openvino_is_an_extra_and_takes_no_operator_of_ours(
    exported: tuple[nn.Module, fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, graph = exported
    gated = fx.GraphModule(graph, fx.Graph(), "Gated")
    x = gated.graph.placeholder("x")
    x.meta["input"] = GraphInput("x", "item", (ROWS, 4))
    gated.register_buffer("one", torch.ones(4))
    vector = gated.graph.create_node("get_attr", "one")
    gated.graph.output(gated.graph.call_function(torch.ops.ninerank.sigmoid_gate.default, (x, vector, vector, vector, vector)))
    gated.recompile()
    if importlib.util.find_spec("openvino") is not None:
        with pytest.raises(BundleError, match="OpenVINO cannot take the graph: .*"):
            backends.lower(gated, CPU, backend="openvino")
        assert logging.getLogger().level == logging.WARNING  # its converter would leave it at ERROR
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match=r"needs the package openvino .*pip install 'ninerank\[openvino\]'"):
        backends.lower(graph, CPU, backend="openvino")


@needs_bf16
def test_inputs_that_are_rounded_anyway_may_come_rounded(exported: tuple[nn.Module, fx.GraphModule]) -> None:
    _, graph = exported
    run = backends.lower(graph, CPU, one=single_request(graph), precision="bf16")
    # The user's half has one row in the graph for one request and is computed in float32 there; "history" is summed first.
    assert run.dtypes == {"item": torch.bfloat16}
    assert backends.lower(graph, CPU).dtypes == {}
    user, item, history, user_row = inputs(1, 20, 3)
    with torch.inference_mode():
        assert torch.equal(run(user, item.to(torch.bfloat16), history, user_row), run(user, item, history, user_row))


@needs_bf16
def test_bf16_stays_within_its_rounding_and_packs_what_is_worth_it(exported: tuple[nn.Module, fx.GraphModule]) -> None:
    module, graph = exported
    run = backends.lower(graph, CPU, one=single_request(graph), backend="script", precision="bf16")
    for shape in SHAPES:
        with torch.inference_mode():
            got, want = run(*inputs(*shape)), scores(module, inputs(*shape))
        assert got.dtype == torch.float32
        assert float((got.sigmoid() - want.sigmoid()).abs().max()) < 1e-3
        assert shape[1] == 1 or not torch.equal(got, want)


class Experts(nn.Module):
    """Two layers of experts side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()) for _ in range(3))

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([expert(given["item"]) for expert in self.experts], dim=1).sum((1, 2), keepdim=True).flatten(1) * 0.1


@needs_bf16
def test_batched_products_are_rounded_too() -> None:
    module = Experts().eval()
    graph = compile_graph(capture(module, [GraphInput("item", "item", (ROWS, 24))]), raise_wrong=True).module
    run = backends.lower(graph, CPU, precision="bf16")
    assert isinstance(run.graph, fx.GraphModule)
    (product,) = run.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.baddbmm.default)
    assert [argument.op for argument in product.args] == ["get_attr", "call_function", "get_attr"]
    x = torch.randn(20, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got, want = run(x), module({"item": x})
    assert 0 < float((got.sigmoid() - want.sigmoid()).abs().max()) < 2e-3


def test_one_request_is_a_bias_in_the_same_operator(exported: tuple[nn.Module, fx.GraphModule]) -> None:
    if not onednn.has_packed_linear():
        pytest.skip("this build of torch has no packed linear layers")
    _, graph = exported
    own = single_request(graph)
    assert onednn.pack_linears(own, bf16=False) == 3
    targets = [node.target for node in own.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.add.Tensor not in targets
    assert torch.ops.aten.relu.default not in targets
    assert torch.ops.aten.index_select.default not in targets
    activations = sorted(node.args[3] for node in own.graph.nodes if node.target is torch.ops.mkldnn._linear_pointwise.default)
    assert activations == ["none", "relu", "sigmoid"]


def test_scripts_run_in_several_threads_at_once(exported: tuple[nn.Module, fx.GraphModule]) -> None:
    module, graph = exported
    run = backends.lower(graph, CPU, one=single_request(graph), backend="script")
    wrong: list[float] = []

    def work(shape: Sequence[int]) -> None:
        with torch.inference_mode():
            want = scores(module, inputs(*shape))
            for _ in range(50):
                difference = float((run(*inputs(*shape)) - want).abs().max())
                if difference > 1e-5:
                    wrong.append(difference)

    threads = [threading.Thread(target=work, args=(shape,)) for shape in SHAPES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_cannot_run_is_refused(exported: tuple[nn.Module, fx.GraphModule]) -> None:
    _, graph = exported
    with pytest.raises(DeviceError, match="unknown backend 'scrpt'; did you mean 'script'"):
        backends.lower(graph, CPU, backend="scrpt")
    with pytest.raises(DeviceError, match="runs on cpu, not on cuda"):
        backends.lower(graph, torch.device("cuda"), backend="script")
    with pytest.raises(DeviceError, match="precision 'bf16' needs backend 'script'"):
        backends.lower(graph, CPU, backend="eager", precision="bf16")


def graph_with(target: Callable[..., object], *arguments: object) -> fx.GraphModule:
    graph = fx.Graph()
    made = graph.call_function(target, (graph.placeholder("x"), *arguments))
    graph.output(made)
    return fx.GraphModule(nn.Module(), graph)


def test_scripts_hold_operators_alone() -> None:
    for target, arguments in ((print, ()), (torch.ops.aten.einsum.default, ('x");import os',)), (getattr, ("shape",))):
        with pytest.raises(BundleError):
            script(graph_with(target, *arguments))
    with pytest.raises(BundleError, match="cannot compile"):
        script(graph_with(torch.ops.aten.relu.default, 3, 4))


def test_a_graph_that_the_automatic_choice_cannot_take_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["input"] = GraphInput("x", "item", (ROWS, 2))
    graph.output(graph.call_function(torch.ops.aten.einsum.default, ("bd,bd->b", [x, x])))
    module = fx.GraphModule(nn.Module(), graph)
    run = backends.lower(module, CPU)
    assert run.backend == "eager"
    assert "it runs operator by operator" in caplog.text
    assert run(torch.ones(3, 2)).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(BundleError, match="holds a string"):
        backends.lower(module, CPU, backend="script")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_lowered_graph_says_which_layers_its_nodes_stand_for(exported: tuple[nn.Module, fx.GraphModule], precision: str) -> None:
    _, graph = exported
    run = backends.lower(graph, CPU, backend="script", precision=precision)
    known = {node.name for node in graph.graph.nodes}
    of = {stands_for(node) for node in run.graph.graph.nodes} - {None}
    assert of <= known
    packed = [node for node in run.graph.graph.nodes if "mkldnn" in str(node.target)]
    assert packed
    layers = {node.name for node in graph.graph.nodes if node.target in (torch.ops.aten.relu.default, torch.ops.aten.sigmoid.default)}
    assert "sigmoid" in layers & of
    last = graph.graph.output_node().args[0]
    assert stands_for(run.graph.graph.output_node().args[0]) == last.name


def test_what_the_automatic_backend_cannot_take_runs_operator_by_operator(
    exported: tuple[nn.Module, fx.GraphModule], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(module: fx.GraphModule, device: torch.device, one_request: bool) -> backends.Run:
        raise RuntimeError("no compiler here")

    module, graph = exported
    monkeypatch.setitem(backends.BACKENDS, "script", backends.Backend(refuse, backends._as_it_is))
    with caplog.at_level(logging.WARNING):
        run = backends.lower(graph, CPU, one=single_request(graph))
    assert run.backend == "eager"
    assert "backend script cannot take this graph (RuntimeError: no compiler here): it runs operator by operator" in caplog.text
    with torch.inference_mode():
        torch.testing.assert_close(run(*inputs(3, 7, 2)), scores(module, inputs(3, 7, 2)), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="no compiler here"):
        backends.lower(graph, CPU, backend="script")


@pytest.mark.parametrize(("name", "kind"), [("npugraphs", "npu"), ("cudagraphs", "cuda")])
def test_a_devices_own_backend_is_refused_elsewhere(exported: tuple[nn.Module, fx.GraphModule], name: str, kind: str) -> None:
    with pytest.raises(DeviceError, match=f"backend '{name}' runs on {kind}, not on cpu; valid: aoti, eager, inductor, openvino, script"):
        backends.lower(exported[1], CPU, backend=name)
