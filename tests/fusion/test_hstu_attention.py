"""HSTU attention over histories without padding against a float64 reference, numeric gradients, and the padded layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.fusion.kernels import registry, threads
from ninerank.fusion.kernels.hstu_attention import hstu_attention
from ninerank.towers.blocks.hstu import HSTULayer


def _case(histories: int, longest: int, heads: int, dims: tuple[int, int], distances: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, biases and offsets; every third history is empty."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (histories,), generator=draw)
    lengths[::3] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count = int(offsets[-1])
    shapes = [(count, heads, dims[0]), (count, heads, dims[0]), (count, heads, dims[1]), (distances,)]
    return [torch.randn(shape, generator=draw) for shape in shapes], offsets


def _run(values: list[Tensor], offsets: Tensor, kernel: str = "auto") -> list[Tensor]:
    own = [value.clone().requires_grad_() for value in values]
    out = hstu_attention(*own, offsets, 0.1, kernel=kernel)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, own, upstream)]


@settings(max_examples=80)
@given(
    *(st.integers(0, 9), st.sampled_from([0, 1, 3, 20]), st.integers(1, 3)),
    *(st.sampled_from([(3, 5), (4, 8), (16, 16), (8, 1)]), st.sampled_from([1, 4, 30]), st.sampled_from([torch.int32, torch.int64])),
    st.integers(0, 2**31),
)
def test_agrees_with_float64(
    histories: int, longest: int, heads: int, dims: tuple[int, int], distances: int, dtype: torch.dtype, seed: int
) -> None:
    values, offsets = _case(histories, longest, heads, dims, distances, seed)
    with registry.count_dispatches() as counts:
        found = _run(values, offsets.to(dtype))
    assert set(counts) == {("hstu_attention", "numba"), ("hstu_attention_backward", "numba")}
    for one, other in zip(found, _run([value.double() for value in values], offsets, "torch"), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-5 * (1 + (float(other.abs().max()) if other.numel() else 0)))


def test_gradcheck() -> None:
    values, offsets = _case(4, 4, 2, (3, 2), 2, 1)
    exact = [value.double().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *v: hstu_attention(*v, offsets, 0.25, kernel="torch"), exact)


def test_same_bits_for_any_number_of_threads(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets = _case(40, 12, 2, (8, 8), 6, 2)
    found = _run(values, offsets)
    monkeypatch.setattr(threads, "num_threads_for", lambda num_elements: 1)
    assert all(torch.equal(one, other) for one, other in zip(found, _run(values, offsets), strict=True))


@pytest.mark.parametrize("has_position_bias", [True, False])
def test_the_layer_without_padding_is_the_padded_one(has_position_bias: bool) -> None:
    layer = HSTULayer(6, num_heads=2, qk_dim=4, value_dim=8, max_length=5, has_position_bias=has_position_bias)
    lengths = torch.tensor([3, 0, 7, 1])
    mask = torch.arange(7) < lengths[:, None]
    padded = torch.randn(4, 7, 6)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    with registry.count_dispatches() as counts:
        found = layer.jagged(padded[mask], offsets)
    assert counts == {("hstu_attention", "numba"): 1}
    expected = layer(padded, mask)[mask]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
    for one, other in zip(grads, torch.autograd.grad(expected.square().sum(), list(layer.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_layer_with_time_buckets_takes_padded_histories_alone() -> None:
    layer = HSTULayer(6, num_heads=1, qk_dim=4, value_dim=4, max_length=5, num_time_buckets=4)
    with pytest.raises(ValueError, match="biases of time are for padded histories"):
        layer.jagged(torch.ones(3, 6), torch.tensor([0, 3]))


def test_what_does_not_fit_is_refused() -> None:
    (q, k, v, position), offsets = _case(4, 4, 2, (3, 2), 2, 1)
    with pytest.raises(ValueError, match=r"\(N, H, V\) and \(M,\), M at least 1, are needed"):
        hstu_attention(q, k, v[:, :1], position, offsets, 0.1)
    with pytest.raises(ValueError, match="M at least 1"):
        hstu_attention(q, k, v, position[:0], offsets, 0.1)
    with pytest.raises(ValueError, match="without falling"):
        hstu_attention(q, k, v, position, offsets + 1, 0.1)
    with pytest.raises(ValueError, match="float32 is needed"):
        hstu_attention(q.half(), k.half(), v.half(), position.half(), offsets, 0.1)


def test_operator_contract() -> None:
    values, offsets = _case(4, 4, 2, (4, 4), 2, 1)
    torch.library.opcheck(torch.ops.ninerank.hstu_attention.default, (*(v.requires_grad_() for v in values), offsets, 0.1, "auto"))
    own = [value.detach() for value in values]
    torch.library.opcheck(torch.ops.ninerank.hstu_attention_backward.default, (own[2], *own, offsets, 0.1, "auto"))
