"""The HSTU layer against its equations in plain loops, and what it must not depend on."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from ninerank.towers.blocks.hstu import HSTULayer

HEADS, QK, VALUE, DIM, MAX_LENGTH = 2, 3, 5, 4, 6
DAY_S = 86_400


def layer_of(num_time_buckets: int = 8, *, has_position_bias: bool = True) -> HSTULayer:
    layer = HSTULayer(
        DIM,
        num_heads=HEADS,
        qk_dim=QK,
        value_dim=VALUE,
        max_length=MAX_LENGTH,
        has_position_bias=has_position_bias,
        num_time_buckets=num_time_buckets,
    ).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
    return layer


def example(rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Histories with gaps and with none, events up to ten days apart."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, DIM, generator=draw, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=draw) < 0.7
    if rows:
        mask[0] = False
        mask[-1] = True
    time = 1_700_000_000 + torch.randint(0, 10 * DAY_S, (rows, length), generator=draw).sort(1).values
    return x, mask, time


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def normalised(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt() * norm.weight + norm.bias


def reference(layer: HSTULayer, x: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        uvqk = [silu(layer.project.weight @ normalised(row, layer.norm) + layer.project.bias) for row in x[b]]
        width = HEADS * VALUE
        for i in range(x.shape[1]):
            if not mask[b, i]:
                continue
            heads = []
            for n in range(HEADS):
                total = torch.zeros(VALUE, dtype=torch.float64)
                for j in range(i + 1):
                    if not mask[b, j]:
                        continue
                    q = uvqk[i][2 * width + n * QK : 2 * width + (n + 1) * QK]
                    k = uvqk[j][2 * width + HEADS * QK + n * QK : 2 * width + HEADS * QK + (n + 1) * QK]
                    score = q @ k
                    if layer.position is not None:
                        score = score + layer.position[min(i - j, MAX_LENGTH - 1)]
                    if layer.time is not None:
                        apart = max(abs(int(time[b, i]) - int(time[b, j])), 1)
                        score = score + layer.time[min(math.floor(math.log2(apart)), len(layer.time) - 1)]
                    total = total + silu(score) / MAX_LENGTH * uvqk[j][width + n * VALUE : width + (n + 1) * VALUE]
                heads.append(total)
            gated = normalised(torch.cat(heads), layer.out_norm) * uvqk[i][:width]
            out[b, i] = x[b, i] + layer.out.weight @ gated + layer.out.bias
    return out


@pytest.mark.parametrize("num_time_buckets", [0, 8, 32])
@pytest.mark.parametrize("has_position_bias", [False, True])
@pytest.mark.parametrize("length", [1, 5, 9])
def test_layer_equals_its_equations(num_time_buckets: int, has_position_bias: bool, length: int) -> None:
    layer = layer_of(num_time_buckets, has_position_bias=has_position_bias)
    x, mask, time = example(4, length)
    torch.testing.assert_close(layer(x, mask, time), reference(layer, x, mask, time), atol=1e-10, rtol=1e-10)


def test_gradients_check_numerically() -> None:
    layer = layer_of()
    x, mask, time = example(3, 4)
    leaves = (x.requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(lambda *_: layer(x, mask, time), leaves, fast_mode=True)


def test_padding_and_what_comes_later_have_no_influence() -> None:
    layer = layer_of()
    x, mask, time = example(4, 8)
    want = layer(x, mask, time)
    noisy = torch.where(mask.unsqueeze(2), x, 9.0)
    torch.testing.assert_close(layer(noisy, mask, time), want)
    torch.testing.assert_close(layer(x[:, :5], mask[:, :5], time[:, :5]), want[:, :5])
    assert not want[~mask].any()


@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0), (0, 0)])
def test_no_rows_and_no_positions(rows: int, length: int) -> None:
    x, mask, time = example(rows, length)
    layer = layer_of()
    out = layer(x, mask, time)
    assert out.shape == (rows, length, DIM)
    out.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_time_buckets_are_powers_of_two_seconds() -> None:
    apart = torch.tensor([0, 1, 2, 3, 4, 127, 128, 10**9])
    time = torch.stack([torch.zeros_like(apart), apart], dim=1) + 1_700_000_000
    assert layer_of(8).bucket(time)[:, 1, 0].tolist() == [0, 0, 1, 1, 2, 6, 7, 7]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_exports_with_a_dynamic_batch_and_length() -> None:
    layer = layer_of().eval()
    dims = {0: torch.export.Dim("rows", min=1, max=1 << 20), 1: torch.export.Dim("length", min=1, max=1 << 12)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(layer, example(3, 5), dynamic_shapes=(dims, dims, dims)).module()
    for rows, length in ((1, 1), (4, 9), (50, 2)):
        given = example(rows, length, seed=rows)
        torch.testing.assert_close(exported(*given), layer(*given))
