"""Every tower against its paper's equation, computed row by row in float64 from the tower's own parameters."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ninerank.errors import SpecError
from ninerank.towers.config import DINConfig, DLRMConfig, FiBiNETConfig, ModelConfig, parse_model
from ninerank.towers.model import SequenceShape, TowerShape
from ninerank.towers.registry import build_tower

MakeInputs = Callable[..., dict[str, Tensor]]
Params = dict[str, Tensor]
Row = dict[str, Tensor]
Settings = dict[str, Any]


def tower_of(config: ModelConfig, shape: TowerShape) -> nn.Module:
    """A tower in float64 whose every parameter and statistic is random, so that none can hide behind a zero."""
    tower = build_tower(config, shape, seed=1).double().eval()
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*tower.named_parameters(), *tower.named_buffers()]:
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.5)
    return tower


def dense_layer(params: Params, prefix: str, x: Tensor) -> Tensor:
    bias = params.get(f"{prefix}.bias")
    weight = params[f"{prefix}.weight"]
    return torch.stack([sum((w[i] * x[i] for i in range(len(x))), torch.zeros(()).double()) for w in weight]) + (
        0 if bias is None else bias
    )


def activate(params: Params, prefix: str, kind: str, x: Tensor) -> Tensor:
    if kind == "relu":
        return x.clamp(min=0)
    if kind == "gelu":
        return torch.stack([v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) for v in x])
    if kind == "prelu":
        return torch.stack([v if v > 0 else params[f"{prefix}.weight"][0] * v for v in x])
    p = 1 / (1 + (-(x - params[f"{prefix}.running_mean"]) / (params[f"{prefix}.running_var"] + 1e-8).sqrt()).exp())
    return p * x + (1 - p) * params[f"{prefix}.alpha"] * x


def mlp(params: Params, prefix: str, config: dict[str, object], x: Tensor, *, has_out: bool = True) -> Tensor:
    i = 0
    for _ in config["hidden"]:  # type: ignore[attr-defined]
        x = dense_layer(params, f"{prefix}.layers.{i}", x)
        i += 1
        if config["batch_norm"]:
            at = f"{prefix}.layers.{i}"
            x = (x - params[f"{at}.running_mean"]) / (params[f"{at}.running_var"] + 1e-5).sqrt() * params[f"{at}.weight"] + params[
                f"{at}.bias"
            ]
            i += 1
        x = activate(params, f"{prefix}.layers.{i}", str(config["activation"]), x)
        i += 2 if config["dropout"] else 1
    return dense_layer(params, f"{prefix}.layers.{i}", x) if has_out else x


def mean_of(row: Row, group: str, name: str) -> Tensor:
    kept = [v for v, m in zip(row[f"{group}.seq.{name}"], row[f"mask.{name}"], strict=True) if m]
    return sum(kept, torch.zeros(row[group].shape[1]).double()) / max(len(kept), 1)


def stack(params: Params, prefix: str, row: Row, shape: TowerShape, group: str, *, numbers: bool) -> list[Tensor]:
    fields = list(row[group])
    if numbers and shape.num_dense:
        fields += [x * v for x, v in zip(row["dense"], params[f"{prefix}.vector_FD"], strict=True)]
    return fields + [mean_of(row, group, s.name) for s in shape.sequences]


def linear_term(params: Params, row: Row, shape: TowerShape) -> Tensor:
    return sum(stack(params, "linear.fields", row, shape, "linear", numbers=True), params["linear.bias_T"])


def pairs(fields: list[Tensor]) -> list[Tensor]:
    return [(fields[f] * fields[g]).sum() for f in range(len(fields)) for g in range(f)]


def reference(config: ModelConfig, shape: TowerShape, params: Params, row: Row) -> Tensor:
    settings = config.model_dump()
    if config.name == "lr":
        return linear_term(params, row, shape)
    if config.name in ("fm", "deepfm"):
        fields = stack(params, "fields", row, shape, "deep", numbers=True)
        logit = linear_term(params, row, shape) + sum(pairs(fields))
        return logit if config.name == "fm" else logit + mlp(params, "mlp", settings["mlp"], torch.cat(fields))
    if config.name == "dlrm":
        fields = stack(params, "fields", row, shape, "deep", numbers=False)
        if not shape.num_dense:
            return mlp(params, "top", settings["top"], torch.stack(pairs(fields)))
        bottom = {**settings["bottom"], "hidden": (*settings["bottom"]["hidden"], 4)}
        z = mlp(params, "bottom", bottom, row["dense"], has_out=False)
        return mlp(params, "top", settings["top"], torch.cat([z, torch.stack(pairs([z, *fields]))]))
    if config.name == "din":
        x = [*row["deep"], row["dense"]]
        for i, s in enumerate(shape.sequences):
            x.append(
                mean_of(row, "deep", s.name) if settings["attention"] == "mean" else attend(settings, params, f"attention.{i}", row, s)
            )
        return mlp(params, "mlp", settings["mlp"], torch.cat(x))
    if config.name in REFERENCES:
        return REFERENCES[config.name](settings, shape, params, row)
    x0 = torch.cat([*stack(params, "", row, shape, "deep", numbers=False), row["dense"]])
    if config.name == "dnn":
        return mlp(params, "mlp", settings["mlp"], x0)
    x = x0
    for layer in range(settings["cross_layers"]):
        if settings["experts"]:
            x = cross_mixture(settings, params, f"cross.layers.{layer}", x0, x)
            continue
        at = f"cross.layers.{layer}.weight"
        weight = params[f"{at}.weight"] if settings["low_rank"] is None else params[f"{at}.1.weight"] @ params[f"{at}.0.weight"]
        x = x0 * (weight @ x + params[f"{at}.bias" if settings["low_rank"] is None else f"{at}.1.bias"]) + x
    if settings["structure"] == "stacked":
        return dense_layer(params, "out", mlp(params, "mlp", settings["mlp"], x, has_out=False))
    return dense_layer(params, "out", torch.cat([x, mlp(params, "mlp", settings["mlp"], x0, has_out=False)]))


def attend(settings: dict[str, object], params: Params, at: str, row: Row, sequence: SequenceShape) -> Tensor:
    q, out, scores, keys = row["deep"][sequence.target], torch.zeros(4).double(), [], []
    for k, kept in zip(row[f"deep.seq.{sequence.name}"], row[f"mask.{sequence.name}"], strict=True):
        if kept:
            x = torch.cat([q, k, q - k, q * k])
            for j in range(len(settings["attention_hidden"])):  # type: ignore[arg-type]
                x = dense_layer(params, f"{at}.linears.{j}", x)
                x = activate(params, f"{at}.activations.{j}", str(settings["attention_activation"]), x)
            scores.append(dense_layer(params, f"{at}.out", x)[0])
            keys.append(k)
    if settings["softmax"] and scores:
        total = sum(s.exp() for s in scores)
        scores = [s.exp() / total for s in scores]
    for s, k in zip(scores, keys, strict=True):
        out = out + s * k
    return out


def cross_mixture(settings: Settings, params: Params, at: str, x0: Tensor, x: Tensor) -> Tensor:
    rank, out = settings["low_rank"], x
    gate = dense_layer(params, f"{at}.gate", x).softmax(0)
    for e in range(settings["experts"]):
        own = slice(e * rank, (e + 1) * rank)
        v = (params[f"{at}.down.weight"][own] @ x).tanh()
        c = torch.stack([(v * column).sum() for column in params[f"{at}.core_ERR"][e].T]).tanh()
        out = out + gate[e] * x0 * (params[f"{at}.up.weight"][:, own] @ c + params[f"{at}.up.bias"])
    return out


def xdeepfm(settings: Settings, shape: TowerShape, params: Params, row: Row) -> Tensor:
    fields = stack(params, "fields", row, shape, "deep", numbers=True)
    x, sums = fields, []
    for k, width in enumerate(settings["cin"]):
        weight = params[f"cin.weights.{k}"].view(width, len(x), len(fields))
        x = [sum(w[i, j] * x[i] * fields[j] for i in range(len(x)) for j in range(len(fields))) for w in weight]
        sums += [v.sum() for v in x]
    crossed = dense_layer(params, "cin_out", torch.stack(sums))
    return linear_term(params, row, shape) + crossed + mlp(params, "mlp", settings["mlp"], torch.cat(fields))


def fibinet(settings: Settings, shape: TowerShape, params: Params, row: Row) -> Tensor:
    fields = stack(params, "fields", row, shape, "deep", numbers=True)
    z = torch.stack([v.mean() for v in fields])
    gate = dense_layer(params, "gate.excite", dense_layer(params, "gate.squeeze", z).clamp(min=0)).clamp(min=0)
    parts = []
    for name, vectors in (("plain", fields), ("gated", [a * v for a, v in zip(gate, fields, strict=True)])):
        places = [(f, g) for f in range(len(fields)) for g in range(f + 1, len(fields))]
        for p, (f, g) in enumerate(places):
            weight = params[f"{name}.weight"]
            own = {"all": lambda w=weight: w, "each": lambda w=weight, f=f: w[f], "interaction": lambda w=weight, p=p: w[p]}
            parts.append(own[settings["bilinear"]]().T @ vectors[f] * vectors[g])
    return linear_term(params, row, shape) + mlp(params, "mlp", settings["mlp"], torch.cat(parts))


def autoint(settings: Settings, shape: TowerShape, params: Params, row: Row) -> Tensor:
    fields = stack(params, "fields", row, shape, "deep", numbers=True)
    x, width = fields, settings["head_dim"]
    for number in range(settings["layers"]):
        q, k, v, residual = ([dense_layer(params, f"layers.{number}.{n}", f) for f in x] for n in ("query", "key", "value", "residual"))
        out = []
        for f in range(len(x)):
            heads = []
            for n in range(settings["heads"]):
                own = slice(n * width, (n + 1) * width)
                weight = torch.stack([q[f][own] @ other[own] for other in k]).softmax(0)
                heads.append(sum(w * other[own] for w, other in zip(weight, v, strict=True)))
            out.append((torch.cat(heads) + residual[f]).clamp(min=0))
        x = out
    logit = dense_layer(params, "out", torch.cat(x))
    return logit + mlp(params, "mlp", settings["mlp"], torch.cat(fields)) if settings["mlp"] else logit


def normalised(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt() * gain + bias


def masknet(settings: Settings, shape: TowerShape, params: Params, row: Row) -> Tensor:
    fields = stack(params, "fields", row, shape, "deep", numbers=True)
    e = torch.cat(fields)
    start = torch.cat([normalised(v, params["norm.gain_FD"][f], params["norm.bias_FD"][f]) for f, v in enumerate(fields)])
    x, outs = start, []
    for k in range(len(settings["blocks"])):
        at, given = f"blocks.{k}", start if settings["structure"] == "parallel" else x
        mask = dense_layer(params, f"{at}.mask.2", dense_layer(params, f"{at}.mask.0", e).clamp(min=0))
        x = normalised(dense_layer(params, f"{at}.hidden", mask * given), params[f"{at}.norm.weight"], params[f"{at}.norm.bias"]).clamp(
            min=0
        )
        outs.append(x)
    return mlp(params, "mlp", settings["mlp"], torch.cat(outs) if settings["structure"] == "parallel" else x)


def mixed(params: Params, at: str, x: Tensor, experts: list[Tensor]) -> Tensor:
    gate = dense_layer(params, f"{at}.linear", x).softmax(0)
    return sum((g * f for g, f in zip(gate, experts, strict=True)), torch.zeros(()).double())


def expert_outputs(settings: Settings, params: Params, at: str, count: int, x: Tensor) -> list[Tensor]:
    return [mlp(params, f"{at}.mlps.{e}", settings["expert"], x, has_out=False) for e in range(count)]


def mmoe(settings: Settings, shape: TowerShape, params: Params, row: Row) -> Tensor:
    x = torch.cat([*stack(params, "", row, shape, "deep", numbers=False), row["dense"]])
    experts = expert_outputs(settings, params, "experts", settings["experts"], x)
    tops = [mixed(params, f"gates.{t}", x, experts) for t in range(shape.num_tasks)]
    return torch.cat([mlp(params, f"towers.{t}", settings["tower"], top) for t, top in enumerate(tops)])


def ple(settings: Settings, shape: TowerShape, params: Params, row: Row) -> Tensor:
    x = torch.cat([*stack(params, "", row, shape, "deep", numbers=False), row["dense"]])
    of_task, of_shared = [x] * shape.num_tasks, x
    for number in range(settings["levels"]):
        at = f"levels.{number}"
        shared = expert_outputs(settings, params, f"{at}.shared", settings["shared_experts"], of_shared)
        own = [expert_outputs(settings, params, f"{at}.own.{t}", settings["task_experts"], given) for t, given in enumerate(of_task)]
        of_task = [mixed(params, f"{at}.gates.{t}", given, own[t] + shared) for t, given in enumerate(of_task)]
        if number + 1 < settings["levels"]:
            of_shared = mixed(params, f"{at}.shared_gate", of_shared, [expert for of_one in own for expert in of_one] + shared)
    return torch.cat([mlp(params, f"towers.{t}", settings["tower"], top) for t, top in enumerate(of_task)])


REFERENCES = {"xdeepfm": xdeepfm, "fibinet": fibinet, "autoint": autoint, "masknet": masknet, "mmoe": mmoe, "ple": ple}


def test_tower_equals_its_equation(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs) -> None:
    tower = tower_of(config, shape)
    inputs = make_inputs(config, shape, 6, dtype=torch.float64)
    params = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    want = torch.stack([reference(config, shape, params, {k: v[b] for k, v in inputs.items()}) for b in range(6)])
    got = tower(inputs)
    assert got.shape == (6, shape.num_tasks)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_gradients_check_numerically(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs) -> None:
    tower = tower_of(config, shape).train()
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # its batch statistics are torch's own; ours (Dice) stay in training mode
    inputs = make_inputs(config, shape, 3, length=3, dtype=torch.float64)
    names = [key for key, value in inputs.items() if value.is_floating_point() and value.numel()]
    leaves = tuple(inputs[name].clone().requires_grad_() for name in names) + tuple(tower.parameters())

    def output(*values: Tensor) -> Tensor:
        out: Tensor = tower({**inputs, **dict(zip(names, values, strict=False))})
        return out

    assert torch.autograd.gradcheck(output, leaves, atol=1e-4, fast_mode=True)


def test_jagged_histories_give_what_padded_ones_do(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs) -> None:
    tower = tower_of(config, shape)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        tower.to(dtype)
        inputs = make_inputs(config, shape, 6, dtype=dtype)
        jagged = {key: value for key, value in inputs.items() if not key.startswith("mask.")}
        for sequence in shape.sequences:
            mask = inputs[f"mask.{sequence.name}"]
            jagged[f"offsets.{sequence.name}"] = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
            jagged.update({f"{group}.seq.{sequence.name}": inputs[f"{group}.seq.{sequence.name}"][mask] for group in config.groups(1)})
        for training in (False, True):
            state, found = {key: value.clone() for key, value in tower.state_dict().items()}, []
            for own in (inputs, jagged):
                tower.load_state_dict(state)
                tower.train(training)
                torch.manual_seed(0)
                logits = tower(own)
                grads = torch.autograd.grad(logits.square().sum(), list(tower.parameters()), allow_unused=True)
                buffers = [buffer.clone() for buffer in tower.buffers()]
                found.append([logits, *(grad for grad in grads if grad is not None), *buffers])
            scale = 1.0
            if dtype == torch.float32:  # a gradient rounds by what flows into it, however small it is itself
                scale = max(scale, *(float(value.detach().abs().max()) for value in found[0] if value.numel()))
            torch.testing.assert_close(*found, atol=tolerance * scale, rtol=tolerance)


def test_rows_do_not_see_each_other_and_padding_has_no_influence(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs) -> None:
    tower = tower_of(config, shape)
    inputs = make_inputs(config, shape, 6, dtype=torch.float64)
    want = tower(inputs)
    turned = tower({key: value.flip(0) for key, value in inputs.items()})
    torch.testing.assert_close(turned, want.flip(0))
    one_by_one = torch.cat([tower({key: value[b : b + 1] for key, value in inputs.items()}) for b in range(6)])
    torch.testing.assert_close(one_by_one, want)
    noise = {key: nn.functional.pad(value, (0, 0, 0, 4), value=3.0) if ".seq." in key else value for key, value in inputs.items()}
    padded = {key: nn.functional.pad(value, (0, 4)) if key.startswith("mask.") else value for key, value in noise.items()}
    torch.testing.assert_close(tower(padded), want)


def test_every_parameter_takes_a_gradient_in_training(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs) -> None:
    tower = build_tower(config, shape, seed=0).train()
    tower(make_inputs(config, shape, 32)).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("rows", [1, 2])
def test_training_takes_a_batch_of_one_row(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs, rows: int) -> None:
    tower = build_tower(config, shape, seed=0).train()
    logits = tower(make_inputs(config, shape, rows))
    logits.sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports_with_a_dynamic_batch(config: ModelConfig, shape: TowerShape, make_inputs: MakeInputs) -> None:
    tower = build_tower(config, shape, seed=0).eval()
    rows, length = torch.export.Dim("rows", min=1, max=1 << 20), torch.export.Dim("length", min=1, max=1 << 16)
    inputs = make_inputs(config, shape, 7)
    dynamic = {key: {0: rows, 1: length} if ".seq." in key or key.startswith("mask.") else {0: rows} for key in inputs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(tower, (inputs,), dynamic_shapes=(dynamic,)).module()
    for count, width in ((7, 5), (1, 5), (300, 1), (2, 9)):
        example = make_inputs(config, shape, count, length=width, seed=count)
        torch.testing.assert_close(exported(example), tower(example), atol=1e-6, rtol=1e-6)


def test_din_without_a_history_and_models_of_pairs_without_a_pair_are_refused() -> None:
    with pytest.raises(SpecError, match="no sequence feature"):
        build_tower(DINConfig(), TowerShape(3, 1, (), 1), seed=0)
    with pytest.raises(SpecError, match="nothing to interact"):
        build_tower(DLRMConfig(), TowerShape(1, 0, (), 1), seed=0)
    with pytest.raises(SpecError, match="nothing to interact"):
        build_tower(FiBiNETConfig(), TowerShape(1, 0, (), 1), seed=0)


def test_din_and_its_ablation_share_all_start_values_but_the_attention() -> None:
    shape = TowerShape(3, 1, (SequenceShape("recent", 0),), 1)
    din = build_tower(parse_model({"name": "din"}), shape, seed=5).state_dict()
    mean = build_tower(parse_model({"name": "din", "attention": "mean"}), shape, seed=5).state_dict()
    assert {key for key in din if not key.startswith("attention.")} == set(mean)
    assert all(torch.equal(din[key], value) for key, value in mean.items())
