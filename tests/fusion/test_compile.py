"""Random models of every kind, compiled with all passes and with each alone: the same scores. Wrong passes are caught."""

import copy
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ninerank.fusion.capture import GraphInput, capture, inputs_of
from ninerank.fusion.compile import SINGLE, PassError, PassRecord, compile_graph, graph_for_one
from ninerank.fusion.cost import measure
from ninerank.fusion.editor import Editor, named_sizes
from ninerank.fusion.passes import PASSES, Pass
from ninerank.fusion.precompute import precompute_items
from ninerank.fusion.single import single_request
from ninerank.fusion.verify import draw_inputs
from ninerank.towers.config import parse_model
from ninerank.towers.model import SequenceShape, TowerShape
from ninerank.towers.registry import build_tower
from ninerank.towers.sides import SidedTower

MODELS = ("lr", "fm", "dnn", "deepfm", "dcnv2", "dlrm", "din", "xdeepfm", "fibinet", "autoint", "masknet", "mmoe", "ple")
aten = torch.ops.aten


class Drawn:
    """A random model over random fields, sequences and numbers of both sides, captured."""

    def __init__(self, seed: int, name: str = "") -> None:
        self.rng = rng = random.Random(seed)
        name = name or MODELS[seed % len(MODELS)]
        least = 1 if name in ("din", "dlrm", "fibinet") else 0
        self.fields = [rng.choice([rng.randint(least, 8), rng.randint(8, 24)]), rng.randint(1, 8)]
        self.dense = [rng.choice([0, 1, 5]), rng.choice([0, 1, 4])]
        sequences = [f"seq{place}" for place in range(rng.randint(1 if name == "din" else 0, 2))]
        self.of_request = {sequence for sequence in sequences if rng.random() < 0.7}
        shapes = tuple(SequenceShape(sequence, rng.randrange(sum(self.fields))) for sequence in sequences)
        shape = TowerShape(sum(self.fields), sum(self.dense), shapes, rng.choice([1, 1, 3]))
        self.config = parse_model({"name": name, **self.settings(name)})
        self.dims = self.config.groups(shape.num_tasks)
        tower = build_tower(self.config, shape, seed=seed).eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for key, value in tower.state_dict().items():
                if value.dtype == torch.float32:
                    drawn = (
                        torch.rand_like(value) + 0.5
                        if key.endswith("var")
                        else torch.randn_like(value) * 0.5 / max(value.shape[-1], 1) ** 0.5
                    )
                    value.copy_(drawn)
        self.module = SidedTower(tower, tuple(self.dims), sorted(self.of_request)).eval()
        self.exact = copy.deepcopy(self.module).double()
        self.inputs = list(self.graph_inputs(sequences))
        self.graph = capture(self.module, self.inputs)

    def settings(self, name: str) -> dict[str, Any]:
        rng = self.rng

        def mlp(**kinds: Any) -> dict[str, Any]:
            hidden = [rng.choice([8, 24, 64]) for _ in range(rng.randint(1, 2))]
            act = rng.choice(["relu", "gelu", "prelu", "dice"])
            return {"hidden": hidden, "activation": act, "batch_norm": rng.random() < 0.5, "dropout": rng.choice([0.0, 0.2]), **kinds}

        dim = {"embedding_dim": rng.choice([2, 8, 16])}
        cross = {"structure": rng.choice(["parallel", "stacked"]), "cross_layers": rng.randint(1, 3), "low_rank": rng.choice([None, 4])}
        attention = {"attention_hidden": [rng.choice([8, 20]), 4], "attention_activation": rng.choice(["dice", "prelu"])}
        pooled = {"softmax": rng.random() < 0.5, "attention": rng.choice(["target", "target", "target", "mean"])}
        kinds: dict[str, dict[str, Any]] = {
            "lr": {},
            "fm": dim,
            "dnn": {**dim, "mlp": mlp()},
            "deepfm": {**dim, "mlp": mlp()},
            "dcnv2": {**dim, **cross, "mlp": mlp()},
            "dlrm": {**dim, "bottom": mlp(hidden=[6]), "top": mlp()},
            "din": {**dim, **attention, **pooled, "mlp": mlp()},
            "xdeepfm": {**dim, "cin": [rng.randint(1, 8) for _ in range(rng.randint(1, 3))], "mlp": mlp()},
            "fibinet": {**dim, "bilinear": rng.choice(["all", "each", "interaction"]), "reduction": rng.randint(1, 4), "mlp": mlp()},
            "autoint": {**dim, "layers": rng.randint(1, 2), "heads": rng.randint(1, 3), "head_dim": 4, "mlp": rng.choice([None, mlp()])},
            "masknet": {**dim, "structure": rng.choice(["serial", "parallel"]), "blocks": [8, 12], "mlp": mlp()},
            "mmoe": {**dim, "experts": rng.randint(1, 4), "expert": mlp(), "tower": mlp()},
            "ple": {**dim, "levels": rng.randint(1, 2), "expert": mlp(), "tower": mlp()},
        }
        return kinds[name]

    def graph_inputs(self, sequences: list[str]) -> Iterator[GraphInput]:
        yield GraphInput("dense.request", "request", ("U", self.dense[0]))
        yield GraphInput("dense.item", "item", ("B", self.dense[1]))
        yield GraphInput("user_row", "joint", ("B",), torch.int64)
        for group, dim in self.dims.items():
            yield GraphInput(f"{group}.request", "request", ("U", self.fields[0], dim))
            yield GraphInput(f"{group}.item", "item", ("B", self.fields[1], dim))
            for sequence in sequences:
                yield self.sequence_input(f"{group}.seq.{sequence}", sequence, dim)
        for sequence in sequences:
            yield self.sequence_input(f"mask.{sequence}", sequence)

    def sequence_input(self, name: str, sequence: str, *dim: int) -> GraphInput:
        is_request = sequence in self.of_request
        rows = "U" if is_request else "B"
        return GraphInput(name, "request" if is_request else "item", (rows, f"L.{sequence}", *dim), torch.float32 if dim else torch.bool)

    def batch(self, requests: int, rows: int, length: int, seed: int) -> dict[str, Tensor]:
        sizes = {"U": requests, "B": rows, "L.seq0": length, "L.seq1": length + 2}
        return draw_inputs(self.inputs, sizes, torch.Generator().manual_seed(seed))


def scores(module: fx.GraphModule, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.sigmoid(module(*[batch[given.name] for given in inputs_of(module)]))


def differs(drawn: Drawn, module: fx.GraphModule, batch: Mapping[str, Tensor]) -> bool:
    """Whether scores are further from the model's, in double precision, than 1e-6 or twice the model's own rounding."""
    doubled = {name: value.double() if value.dtype == torch.float32 else value for name, value in batch.items()}
    with torch.inference_mode():
        exact, own = torch.sigmoid(drawn.exact(doubled)), torch.sigmoid(drawn.module(batch))
    allowed = max(1e-6, 2 * float((own - exact).abs().max()))
    return not float((scores(module, batch) - exact).abs().max()) <= allowed


def check(drawn: Drawn, module: fx.GraphModule, seed: int) -> None:
    """The module's scores are the model's, and so are the source graph's, for one request and for several."""
    for requests, rows, length in ((1, 40, 6), (1, 1, 1), (7, 30, 3)):
        batch = drawn.batch(requests, rows, length, seed)
        assert not differs(drawn, drawn.graph, batch)
        assert not differs(drawn, module, batch)
        if requests == 1:
            assert not differs(drawn, single_request(module), batch)


def alone(graph: fx.GraphModule, own: Pass) -> tuple[fx.GraphModule, int]:
    """What one pass makes of a graph by itself, and how often it fired."""
    editor, total = Editor(graph), 0
    while fired := own.apply(editor):
        total += fired
    return editor.done(), total


def check_precomputed(drawn: Drawn, module: fx.GraphModule, seed: int) -> bool:
    """Values kept by item, taken in another order and number than they were made in, give the model's scores."""
    cut = precompute_items(module)
    if cut is None:
        return False
    assert all(given.role in ("item", "constant") for given in inputs_of(cut.items))
    made = drawn.batch(1, 12, 4, seed)
    with torch.inference_mode():
        kept = cut.items(*[made[given.name] for given in inputs_of(cut.items)])
    assert [value.shape[1:] for value in kept] == [value.dims[1:] for value in cut.values]
    for requests, places in ((1, torch.tensor([3, 3, 0, 11, 7])), (3, torch.tensor([5]))):
        batch = drawn.batch(requests, len(places), 4, seed + 1)
        batch |= {given.name: made[given.name][places] for given in drawn.inputs if given.role == "item"}
        values = {value.name: tensor[places] for value, tensor in zip(cut.values, kept, strict=True)}
        assert not differs(drawn, cut.rest, batch | values)
        if requests == 1:
            assert not differs(drawn, single_request(cut.rest), batch | values)
    return True


def check_models(seeds: range) -> Counter[str]:
    """Check models; returns on how many each pass fired and was kept."""
    fired, priced = Counter[str](), Counter[str]()
    for seed in seeds:
        drawn = Drawn(seed)
        compiled = compile_graph(drawn.graph, raise_wrong=True)
        check(drawn, compiled.module, seed)
        fired["(precomputed)"] += check_precomputed(drawn, compiled.module, seed)
        assert compiled.after.modelled_us <= compiled.before.modelled_us
        fired.update(compiled.fired.keys())
        priced.update({record.name for record in compiled.records if record.withdrawn})
        for own in PASSES:
            module, count = alone(drawn.graph, own)
            if count:
                check(drawn, module, seed)
    print(f"models on which a pass fired: {dict(fired)}; did not pay: {dict(priced)}")
    return fired


def test_random_models_keep_their_scores() -> None:
    fired = check_models(range(26, 26 + 20))
    assert all(fired[own.name] >= 1 for own in PASSES), fired
    assert fired["(precomputed)"] >= 10


@pytest.mark.slow
def test_three_hundred_random_models_keep_their_scores_and_every_pass_fires_on_ten() -> None:
    """About a second of one core for each model: torch.export takes a third of it."""
    fired = check_models(range(1000, 1300))
    assert all(fired[own.name] >= 10 for own in PASSES), fired


def drop_a_bias(editor: Editor) -> int:
    """A wrong pass: a Linear loses its bias."""
    for node in editor.calls(aten.linear.default):
        if len(node.args) == 3:
            with editor.before(node):
                editor.replace(node, editor.call(aten.linear.default, *node.args[:2]))
            return 1
    return 0


def break_down(editor: Editor) -> int:
    raise KeyError("nothing")


def slow_down(editor: Editor) -> int:
    """A right pass that only costs."""
    (output,) = editor.graph.find_nodes(op="output")
    (result,) = output.args
    if result.target is aten.neg.default:
        return 0
    with editor.before(output):
        output.args = (editor.call(aten.neg.default, editor.call(aten.neg.default, result)),)
    return 1


def test_a_wrong_pass_raises_in_tests_and_is_withdrawn_elsewhere() -> None:
    drawn = Drawn(2)
    passes = [*PASSES, Pass("planted", drop_a_bias)]
    with pytest.raises(PassError, match="scores differ"):
        compile_graph(drawn.graph, passes=passes, raise_wrong=True)
    compiled = compile_graph(drawn.graph, passes=passes)
    check(drawn, compiled.module, 2)
    (record,) = (r for r in compiled.records if r.name == "planted")
    assert record.withdrawn
    assert record.difference > 1e-6
    assert "scores differ by" in record.why
    assert compiled.fired == compile_graph(drawn.graph).fired


def test_a_pass_that_fails_is_left_out() -> None:
    drawn = Drawn(2)
    with pytest.raises(PassError, match="pass planted failed: KeyError"):
        compile_graph(drawn.graph, passes=[Pass("planted", break_down)], raise_wrong=True)
    compiled = compile_graph(drawn.graph, passes=[Pass("planted", break_down), *PASSES])
    assert compiled.records[0].why == "failed: KeyError: 'nothing'"
    assert compiled.fired["constants"] >= 1


def test_a_pass_that_does_not_pay_is_withdrawn() -> None:
    drawn = Drawn(2)
    compiled = compile_graph(drawn.graph, passes=[Pass("planted", slow_down)])
    (record, _) = compiled.records
    assert record.withdrawn
    assert record.why.startswith("does not pay")
    assert compiled.module is drawn.graph
    assert compile_graph(drawn.graph, passes=[Pass("planted", slow_down)], must_pay=False).fired == {"planted": 1}


def clamp_an_input(editor: Editor) -> int:
    """Right on what is drawn at random, wrong where an input is above 5."""
    (node,) = (node for node in editor.graph.find_nodes(op="placeholder") if node.meta["input"].name == "linear.item")
    (user,) = node.users
    if user.target is aten.clamp.default:
        return 0
    with editor.before(user):
        user.replace_input_with(node, editor.call(aten.clamp.default, node, -5, 5))
    return 1


def test_golden_batches_count() -> None:
    drawn = Drawn(0)
    planted = [Pass("planted", clamp_an_input)]
    assert compile_graph(drawn.graph, passes=planted, must_pay=False, raise_wrong=True).fired == {"planted": 1}
    golden = drawn.batch(2, 5, 3, seed=1)
    golden["linear.item"][0, 0] = 6.0
    with pytest.raises(PassError, match="scores differ"):
        compile_graph(drawn.graph, [golden], passes=planted, must_pay=False, raise_wrong=True)


def test_records_are_plain_data() -> None:
    compiled = compile_graph(Drawn(3).graph)
    for record in compiled.records:
        assert PassRecord.model_validate_json(record.model_dump_json()) == record
    names = {record.name for record in compiled.records}
    assert names == {own.name for own in PASSES} | {SINGLE}
    assert compiled.after == measure(single_request(compiled.module))


def test_a_graph_for_one_request_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(2)
    compiled = compile_graph(drawn.graph)
    assert graph_for_one(compiled.module, compiled.records) is not compiled.module

    def planted(module: fx.GraphModule) -> fx.GraphModule:
        editor = Editor(single_request(module), named_sizes(module) | {"U": 1})
        drop_a_bias(editor)
        return editor.done()

    monkeypatch.setattr("ninerank.fusion.compile.single_request", planted)
    compiled = compile_graph(drawn.graph)
    (record,) = (r for r in compiled.records if r.name == SINGLE)
    assert "scores differ by" in record.why
    assert graph_for_one(compiled.module, compiled.records) is compiled.module


def test_the_item_half_of_a_first_layer_is_kept_by_item() -> None:
    inputs = [
        GraphInput("a.request", "request", ("U", 3, 16)),
        GraphInput("b.item", "item", ("B", 3, 16)),
        GraphInput("user_row", "joint", ("B",), torch.int64),
    ]
    compiled = compile_graph(capture(Split(), inputs), raise_wrong=True)
    cut = precompute_items(compiled.module)
    assert cut is not None
    assert [value.dims for value in cut.values] == [("B", 32)]
    assert cut.numbers_per_item == 32
    assert [given.name for given in inputs_of(cut.items)] == ["b.item"]
    assert [given.name for given in inputs_of(cut.rest)][:2] == ["a.request", "user_row"]
    assert measure(cut.rest).flops < measure(compiled.module).flops / 5
    joint = capture(Joint(), inputs)
    assert precompute_items(joint) is None


class Split(nn.Module):
    """One hidden layer over both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6 * 16, 32)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        both = torch.cat([inputs["a.request"].index_select(0, inputs["user_row"]), inputs["b.item"]], dim=1)
        return torch.relu(self.linear(both.flatten(1))).sum(1, keepdim=True) * 0.1


class Joint(nn.Module):
    """Nothing of the item side but its inputs."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return (inputs["a.request"].index_select(0, inputs["user_row"]) * inputs["b.item"]).sum(2).sum(1, keepdim=True)


class Sized(nn.Module):
    """Reads how many numbers of an input are above 0: a size that nobody knows beforehand."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        kept = torch.nonzero(inputs["b.item"])
        return inputs["b.item"].sum(1, keepdim=True) + kept.shape[0]


def test_a_graph_that_cannot_be_analysed_stays_as_it_is() -> None:
    graph = capture(Sized(), [GraphInput("b.item", "item", ("B", 3))])
    compiled = compile_graph(graph)
    assert compiled.module is graph
    assert graph_for_one(graph, compiled.records) is graph
    assert all(record.why.startswith("the graph cannot be analysed") for record in compiled.records)
    with pytest.raises(Exception, match="nonzero|Dynamic|dynamic"):
        compile_graph(graph, raise_wrong=True)


class Viewing(nn.Module):
    """A tower that flattens by sizes, and doubles what it drew at random."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6 * 16, 32)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        both = torch.cat([inputs["a.request"].index_select(0, inputs["user_row"]), inputs["b.item"]], dim=1)
        zeros = 0 * (torch.rand_like(both) - torch.rand_like(both)).sum(2).sum(1, keepdim=True)
        return torch.relu(self.linear(both.view(both.shape[0], -1))).sum(1, keepdim=True) * 0.1 + zeros


def test_views_by_size_are_split_and_random_numbers_stay_two() -> None:
    inputs = [
        GraphInput("a.request", "request", ("U", 3, 16)),
        GraphInput("b.item", "item", ("B", 3, 16)),
        GraphInput("user_row", "joint", ("B",), torch.int64),
    ]
    compiled = compile_graph(capture(Viewing(), inputs), raise_wrong=True)
    assert compiled.fired["linears"] == 1
    assert sum(node.target is aten.rand_like.default for node in compiled.module.graph.nodes) == 2


class Unknown(nn.Module):
    """Operators that no pass knows, sizes as numbers, and a request side that meets the items late."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        user = torch.cumsum(inputs["a.request"], dim=0)[inputs["user_row"]]
        both = torch.cat([inputs["a.request"].index_select(0, inputs["user_row"]), inputs["b.item"]], dim=1)
        ranks = torch.zeros(both.shape[0], 3)
        flipped = both.view(both.shape[0], -1).flip(0)
        return (user.sum(1, keepdim=True) + torch.logcumsumexp(flipped, 1)[:, -1:] + ranks.sum(1, keepdim=True)) * 0.1


def test_what_no_pass_knows_is_left_as_it_is() -> None:
    inputs = [
        GraphInput("a.request", "request", ("U", 4)),
        GraphInput("b.item", "item", ("B", 3)),
        GraphInput("user_row", "joint", ("B",), torch.int64),
    ]
    module = Unknown()
    graph = capture(module, inputs)
    compiled = compile_graph(graph, must_pay=False, raise_wrong=True)
    for sizes in ({"U": 1, "B": 5}, {"U": 4, "B": 9}):
        batch = draw_inputs(inputs, sizes, torch.Generator().manual_seed(1))
        assert torch.allclose(compiled.module(*batch.values()), module(batch), atol=1e-6)


class SideBySide(nn.Module):
    """Experts of two layers with activations of all kinds, gates over them, and heads that are joined."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        kinds: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "prelu": nn.PReLU, "gelu": nn.GELU}
        act = kinds[activation]
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(96, 64), act(), nn.Linear(64, 32), act(), nn.Linear(32, 32)) for _ in range(5))
        self.gates = nn.ModuleList(nn.Linear(96, 5) for _ in range(3))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(32, 16), act(), nn.Linear(16, 1)) for _ in range(3))
        for place, module in enumerate(m for m in self.modules() if isinstance(m, nn.PReLU)):
            nn.init.constant_(module.weight, 0.1 * place)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        x = torch.cat([inputs["a.request"].index_select(0, inputs["user_row"]), inputs["b.item"]], dim=1).flatten(1)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = [torch.bmm(torch.softmax(gate(x), 1).unsqueeze(1), experts).squeeze(1) for gate in self.gates]
        return torch.cat([head(x) for head, x in zip(self.heads, mixed, strict=True)], dim=1)


@pytest.mark.parametrize("activation", ["relu", "prelu", "gelu"])
def test_experts_gates_and_heads_become_batched_products(activation: str) -> None:
    inputs = [
        GraphInput("a.request", "request", ("U", 3, 16)),
        GraphInput("b.item", "item", ("B", 3, 16)),
        GraphInput("user_row", "joint", ("B",), torch.int64),
    ]
    module = SideBySide(activation)
    compiled = compile_graph(capture(module, inputs), raise_wrong=True)
    called = Counter(node.target for node in compiled.module.graph.nodes)
    # Two first layers, of both sides: experts and gates. Two layers of experts and two of heads; the mix of experts.
    assert (called[aten.linear.default], called[aten.baddbmm.default], called[aten.bmm.default]) == (4, 4, 1)
    assert called[aten.stack.default] == 0
    assert compiled.after.launches <= compiled.before.launches / 3
    batch = draw_inputs(inputs, {"U": 2, "B": 9}, torch.Generator().manual_seed(1))
    torch.testing.assert_close(compiled.module(*batch.values()), module(batch), atol=1e-5, rtol=1e-5)


class Uneven(SideBySide):
    """What looks like experts but is not: one expert is wider, one reads another part, gates see different experts."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        x = torch.cat([inputs["a.request"].index_select(0, inputs["user_row"]), inputs["b.item"]], dim=1).flatten(1)
        halves = [x[:, :48], x[:, :48], x[:, 48:]]
        weights = [self.get_parameter(f"experts.{place}.0.weight")[:, :48] for place in range(3)]
        layers = [self.get_submodule(f"experts.{place}.2") for place in range(3)]
        first = [torch.relu(half @ weight.T) for half, weight in zip(halves, weights, strict=True)]
        second = [torch.relu(layers[0](first[0])), torch.tanh(layers[1](first[1])), layers[2](first[2])]
        mixed = [torch.softmax(gate(x), 1)[:, :1] * own for gate, own in zip(self.gates, second, strict=True)]
        return torch.cat([head(mixed[2 - place]) for place, head in enumerate(self.heads)], dim=1)


def test_what_is_not_of_one_form_stays_apart() -> None:
    inputs = [
        GraphInput("a.request", "request", ("U", 3, 16)),
        GraphInput("b.item", "item", ("B", 3, 16)),
        GraphInput("user_row", "joint", ("B",), torch.int64),
    ]
    module = Uneven("relu")
    compiled = compile_graph(capture(module, inputs), must_pay=False, raise_wrong=True)
    batch = draw_inputs(inputs, {"U": 2, "B": 9}, torch.Generator().manual_seed(1))
    torch.testing.assert_close(compiled.module(*batch.values()), module(batch), atol=1e-5, rtol=1e-5)
