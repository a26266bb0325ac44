from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.towers.blocks.attention import TargetAttention
from ninerank.towers.blocks.fields import masked_mean
from ninerank.towers.blocks.interaction import CrossNet, DotInteraction, FMInteraction
from ninerank.towers.blocks.mlp import MLP, BatchNorm, Dice, linear
from ninerank.towers.config import MLPConfig


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 5), fields=st.integers(0, 7), dim=st.integers(1, 6), seed=st.integers(0, 999))
def test_fm_is_the_sum_of_the_dot_products_of_all_pairs(rows: int, fields: int, dim: int, seed: int) -> None:
    v = torch.randn(rows, fields, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    dots = DotInteraction(fields)(v)
    assert dots.shape == (rows, fields * (fields - 1) // 2)
    want = [[float((v[b, f] * v[b, g]).sum()) for f in range(fields) for g in range(f)] for b in range(rows)]
    torch.testing.assert_close(dots, torch.tensor(want, dtype=torch.float64).view(dots.shape))
    torch.testing.assert_close(FMInteraction()(v), dots.sum(1, keepdim=True), atol=1e-9, rtol=1e-9)


def test_cross_net_of_k_layers_is_a_polynomial_of_degree_k_plus_one() -> None:
    net = CrossNet(3, 2, low_rank=2).double()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    direction = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
    t = torch.arange(6, dtype=torch.float64)[:, None]
    values = net(t * direction)
    third_differences = values.diff(n=3, dim=0)
    torch.testing.assert_close(third_differences, third_differences[:1].expand_as(third_differences))
    assert third_differences.abs().min() > 1e-6
    assert values.diff(n=4, dim=0).abs().max() < 1e-9 * values.abs().max()


def test_linear_starts_from_xavier_normal_weights_and_zero_bias() -> None:
    torch.manual_seed(0)
    layer = linear(300, 500)
    assert layer.weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.01)
    assert not layer.bias.any()


def test_mlp_order_is_linear_norm_activation_dropout() -> None:
    mlp = MLP(3, MLPConfig(hidden=(4, 2), activation="dice", batch_norm=True, dropout=0.5), 1)
    kinds = [type(layer).__name__ for layer in mlp.layers]
    assert kinds == ["Linear", "BatchNorm", "Dice", "Dropout"] * 2 + ["Linear"]
    assert MLP(3, MLPConfig(hidden=(4, 2))).width == 2
    assert MLP(3, MLPConfig(hidden=())).width == 3


def test_batch_norm_equals_torch_but_takes_one_row() -> None:
    ours, theirs = BatchNorm(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(9, 4)
    assert torch.equal(ours(x), theirs(x))
    running = ours.running_mean
    assert running is not None
    before = running.clone()
    one = ours(x[:1])
    assert torch.equal(one, ours.eval()(x[:1]))
    assert torch.equal(running, before)


def test_dice_normalises_by_the_batch_then_by_its_running_statistics() -> None:
    dice = Dice(3)
    torch.nn.init.constant_(dice.alpha, 0.25)
    x = torch.randn(200, 3) * 2 + 1
    p = torch.sigmoid((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-8).sqrt())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * 0.25 * x)
    torch.testing.assert_close(dice.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(dice.running_var, 0.9 + 0.1 * x.var(0, unbiased=False))
    for _ in range(300):
        dice(x)
    torch.testing.assert_close(dice.eval()(x), p * x + (1 - p) * 0.25 * x, atol=1e-4, rtol=1e-4)


def test_dice_counts_kept_rows_alone() -> None:
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) < 0.5
    masked, plain = Dice(3), Dice(3)
    torch.testing.assert_close(masked(x, mask)[mask], plain(x[mask]))
    torch.testing.assert_close(masked.running_var, plain.running_var)
    before = masked.running_mean.clone()
    assert torch.isfinite(masked(x, torch.zeros(4, 5, dtype=torch.bool))).all()
    assert torch.equal(masked.running_mean, before)


def test_masked_mean_of_nothing_is_zero() -> None:
    rows = torch.tensor([[[1.0], [3.0], [9.0]], [[5.0], [5.0], [5.0]]])
    assert masked_mean(rows, torch.tensor([[True, True, False], [False, False, False]])).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("act", ["dice", "prelu"])
def test_attention_of_one_key_and_of_none(softmax: bool, act: str) -> None:
    attention = TargetAttention(4, (6,), act, softmax=softmax)  # type: ignore[arg-type]
    query, keys = torch.randn(2, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    out = attention(query, keys, mask)
    assert not out[1].any()
    if softmax:
        torch.testing.assert_close(out[0], keys[0, 0])
    else:
        ratio = out[0] / keys[0, 0]
        torch.testing.assert_close(ratio, ratio[:1].expand(4))


def test_attention_statistics_in_training_do_not_depend_on_padding() -> None:
    outputs = []
    for width in (3, 8):
        torch.manual_seed(0)
        attention = TargetAttention(4, (6, 3), "dice").train()
        draw: Callable[..., torch.Tensor] = torch.Generator().manual_seed(1)  # type: ignore[assignment]
        query, keys = torch.randn(5, 4, generator=draw), torch.randn(5, 3, 4, generator=draw)  # type: ignore[call-overload]
        mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
        pad = width - 3
        keys, mask = torch.nn.functional.pad(keys, (0, 0, 0, pad)), torch.nn.functional.pad(mask, (0, pad))
        outputs.append(attention(query, keys, mask))
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("hidden", [(), (6,), (6, 3)])
def test_attention_is_the_same_in_training_in_evaluation_and_without_padding(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    attention = TargetAttention(4, hidden, "prelu").double()
    torch.nn.init.normal_(attention._layers[0].bias)
    query, keys = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [0], [2]])
    found = []
    for out in (
        attention.train()(query, keys, mask),
        attention.eval()(query, keys, mask),
        attention.jagged(query, keys[mask], torch.tensor([0, 5, 5, 7])),
    ):
        grads = torch.autograd.grad(out.square().sum(), list(attention.parameters()))
        found.append([out, *grads])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
