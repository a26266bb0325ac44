"""Layers of an MLP as one operator, against a float64 reference, numeric gradients and torch's own layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ninerank.fusion.kernels import registry, threads
from ninerank.fusion.kernels.mlp_layer import mlp_layer
from ninerank.towers.blocks.mask import MaskBlock
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import MLPConfig

KINDS = [("relu", False), ("none", False), ("relu", True), ("none", True)]


def _case(rows: int, num_in: int, num_out: int, masked: bool, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, num_in), (num_out, num_in), (num_out,), *([(rows, num_out)] if masked else [])]
    return [torch.randn(shape, generator=draw) for shape in shapes]


def _run(values: list[Tensor], activation: str, kernel: str = "auto") -> list[Tensor]:
    """Result and gradients."""
    own = [value.clone().requires_grad_() for value in values]
    out = mlp_layer(*own[:3], activation, *own[3:], kernel=kernel)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, own, upstream)]


@settings(max_examples=80)
@given(
    *(st.sampled_from([0, 1, 2, 127, 129, 300]), st.sampled_from([1, 3, 16])),
    *(st.sampled_from([1, 3, 4, 8, 20]), st.sampled_from(KINDS), st.integers(0, 2**31)),
)
def test_agrees_with_float64(rows: int, num_in: int, num_out: int, kind: tuple[str, bool], seed: int) -> None:
    values = _case(rows, num_in, num_out, kind[1], seed)
    # Sums near zero may fall on either side of it in either precision: keep away from the corner.
    z = values[0].double() @ values[1].double().t() + values[2].double()
    values[0][(z.abs() < 1e-4).any(1)] = 0
    values[2][values[2].abs() < 1e-3] = 0.5
    with registry.count_dispatches() as counts:
        found = _run(values, kind[0])
    assert set(counts) == {("mlp_layer", "numba"), ("mlp_layer_backward", "numba")}
    for one, other in zip(found, _run([value.double() for value in values], kind[0], "torch"), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5 * (float(other.abs().max()) if other.numel() else 0) + 1e-4)


@pytest.mark.parametrize(("activation", "masked"), KINDS)
def test_gradcheck(activation: str, masked: bool) -> None:
    exact = [value.double().requires_grad_() for value in _case(5, 4, 3, masked, 1)]
    assert torch.autograd.gradcheck(lambda x, w, b, *m: mlp_layer(x, w, b, activation, *m, kernel="torch"), exact)


@pytest.mark.parametrize(("activation", "masked"), KINDS)
def test_same_bits_for_any_number_of_threads(activation: str, masked: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = _case(700, 6, 12, masked, 2)
    found = _run(values, activation)
    monkeypatch.setattr(threads, "num_threads_for", lambda num_elements: 1)
    assert all(torch.equal(one, other) for one, other in zip(found, _run(values, activation), strict=True))


def test_mlps_and_masks_train_through_it() -> None:
    x, other = torch.randn(40, 8), torch.randn(40, 6)
    mlp, block = MLP(8, MLPConfig(hidden=(16, 12), dropout=0.0), 1), MaskBlock(8, 6, 5, 2.0)
    plain_mlp = mlp.layers(x)
    plain_block = block.norm(block.hidden(block.mask(x) * other)).relu()
    with registry.count_dispatches() as counts:
        found = mlp(x), block(x, other)
        (found[0].sum() + found[1].sum()).backward()
    assert counts == {("mlp_layer", "numba"): 4, ("mlp_layer_backward", "numba"): 4}
    torch.testing.assert_close(found[0], plain_mlp)
    torch.testing.assert_close(found[1], plain_block)
    grads = {
        name: parameter.grad.clone()
        for name, parameter in (*mlp.named_parameters(), *block.named_parameters())
        if parameter.grad is not None
    }
    mlp.zero_grad()
    block.zero_grad()
    (plain_mlp.sum() + plain_block.sum()).backward()
    for name, parameter in (*mlp.named_parameters(), *block.named_parameters()):
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_an_mlp_with_other_layers_keeps_them() -> None:
    mlp = MLP(8, MLPConfig(hidden=(16, 12), batch_norm=True, dropout=0.2), 1)
    with registry.count_dispatches() as counts:
        mlp(torch.randn(40, 8))
    assert not counts
    assert isinstance(mlp.layers[0], nn.Linear)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = _case(2, 3, 4, False, 0)
    with pytest.raises(ValueError, match=r"\(O, I\), \(O,\)"):
        mlp_layer(x, weight.t().contiguous(), bias, "relu")
    with pytest.raises(ValueError, match=r"and, if at all, \(B, O\)"):
        mlp_layer(x, weight, bias, "relu", torch.ones(2, 3))
    with pytest.raises(ValueError, match="activation 'tanh'; one of none, relu is needed"):
        mlp_layer(x, weight, bias, "tanh")
    with pytest.raises(ValueError, match="float32 is needed"):
        mlp_layer(x.half(), weight.half(), bias.half(), "relu")


def test_operator_contract() -> None:
    values = [value.requires_grad_() for value in _case(4, 3, 8, True, 0)]
    torch.library.opcheck(torch.ops.ninerank.mlp_layer.default, (*values[:3], "relu", values[3], "auto"))
    torch.library.opcheck(torch.ops.ninerank.mlp_layer.default, (*values[:3], "none", None, "auto"))
    own = [value.detach() for value in values]
    grad, a = torch.randn(4, 8), torch.rand(4, 8)
    torch.library.opcheck(torch.ops.ninerank.mlp_layer_backward.default, (grad, own[0], own[1], a, "relu", True, own[3], "auto"))
