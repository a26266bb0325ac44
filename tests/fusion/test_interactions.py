"""Crosses, FM and dot interaction against float64 references, numeric gradients, and one another."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.dot_interaction import dot_interaction
from ninerank.fusion.kernels.fm_interaction import fm_interaction
from ninerank.fusion.kernels.low_rank_cross import low_rank_cross

DIMS = (1, 3, 4, 7, 8, 16, 17, 100)
Interaction = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("interact", [fm_interaction, dot_interaction])


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _cross_case(rows: int, width: int, rank: int, seed: int, layers: int = 2) -> list[Tensor]:
    shapes = ((rows, width), (layers, rank, width), (layers, rank, width), (layers, width))
    return [_draw(*shape, seed=seed + i) * (0.3 if i else 1.0) for i, shape in enumerate(shapes)]


def _agrees(operator: Interaction, name: str, values: list[Tensor], seed: int) -> None:
    """The Numba kernel's result and gradients are those of the float64 reference."""
    exact = [value.double().requires_grad_() for value in values]
    expected = operator(*exact, kernel="torch")
    grad = _draw(*expected.shape, seed=seed)
    own = [value.clone().requires_grad_() for value in values]
    with registry.count_dispatches() as counts:
        found = operator(*own)
        grads = torch.autograd.grad(found, own, grad)
    assert set(counts) == {(name, "numba"), (f"{name}_backward", "numba")}
    for one, other in zip((found.detach(), *grads), (expected.detach(), *torch.autograd.grad(expected, exact, grad.double())), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5 * (float(other.abs().max()) if other.numel() else 1) + 1e-6)


@settings(max_examples=80)
@given(
    st.sampled_from([0, 1, 2, 127, 128, 300]),
    st.sampled_from([1, 3, 4, 8, 20, 100]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 2**31),
)
def test_cross_agrees_with_float64(rows: int, width: int, rank: int, layers: int, seed: int) -> None:
    _agrees(low_rank_cross, "low_rank_cross", _cross_case(rows, width, rank, seed, layers), seed)


def test_cross_is_its_equation_and_leaves_what_it_was_given() -> None:
    x0, down, up, bias = (value.double().requires_grad_() for value in _cross_case(5, 6, 2, 0, 3))
    x = x0
    for i in range(3):
        x = x0 * (x @ down[i].t() @ up[i] + bias[i]) + x
    found, grad = low_rank_cross(x0, down, up, bias), torch.ones_like(x)
    torch.testing.assert_close(found, x)
    inputs = (x0, down, up, bias)
    expected = torch.autograd.grad(x, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, grad), expected)
    assert bool((grad == 1).all())


@BOTH
@settings(max_examples=80)
@given(rows=st.integers(0, 30), fields=st.sampled_from([1, 2, 3, 8, 27]), dim=st.sampled_from(DIMS), seed=st.integers(0, 2**31))
def test_interactions_agree_with_float64(interact: Interaction, rows: int, fields: int, dim: int, seed: int) -> None:
    _agrees(interact, interact.__name__, [_draw(rows, fields, dim, seed=seed)], seed)


def test_dot_interaction_of_any_number_of_fields_has_its_pairs_in_order() -> None:
    fields = _draw(3, 5, 4)
    for kernel in ("numba", "torch"):
        found = dot_interaction(fields, kernel=kernel)
        expected = torch.stack([(fields[:, f] * fields[:, g]).sum(1) for f in range(5) for g in range(f)], dim=1)
        torch.testing.assert_close(found, expected)
        assert torch.allclose(found.sum(1, keepdim=True), fm_interaction(fields, kernel=kernel), atol=1e-4)


@pytest.mark.parametrize("operator", [fm_interaction, dot_interaction, low_rank_cross])
def test_gradcheck(operator: Interaction) -> None:
    values = _cross_case(4, 5, 2, 1) if operator is low_rank_cross else [_draw(3, 4, 2)]
    exact = [value.double().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *v: operator(*v, kernel="torch"), exact)


@pytest.mark.parametrize("operator", [fm_interaction, dot_interaction, low_rank_cross])
def test_same_bits_for_any_number_of_threads(operator: Interaction, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ninerank.fusion.kernels import threads

    values = _cross_case(700, 12, 4, 2) if operator is low_rank_cross else [_draw(101, 7, 16)]

    def run() -> list[Tensor]:
        own = [value.clone().requires_grad_() for value in values]
        out = operator(*own)
        return [out, *torch.autograd.grad(out, own, out.detach())]

    found = run()
    monkeypatch.setattr(threads, "num_threads_for", lambda num_elements: 1)
    assert all(torch.equal(one, other) for one, other in zip(found, run(), strict=True))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, F, D\) is needed"):
        fm_interaction(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(B, F, D\) is needed"):
        dot_interaction(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(L, R, I\) and \(L, I\) are needed"):
        low_rank_cross(torch.ones(2, 3), torch.ones(1, 2, 3), torch.ones(1, 3, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="with a layer at least"):
        low_rank_cross(torch.ones(2, 3), torch.ones(0, 2, 3), torch.ones(0, 2, 3), torch.ones(0, 3))
    with pytest.raises(ValueError, match="float32 is needed"):
        fm_interaction(torch.ones(1, 2, 3).half())


def test_cross_is_float32_within_autocast() -> None:
    values = _cross_case(6, 8, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low_rank_cross(*values), low_rank_cross(*values))
        within = low_rank_cross(*values)
    assert torch.equal(within, low_rank_cross(*values))


def test_operator_contract() -> None:
    fields = _draw(3, 4, 8).requires_grad_()
    torch.library.opcheck(torch.ops.ninerank.fm_interaction.default, (fields, "auto"))
    torch.library.opcheck(torch.ops.ninerank.dot_interaction.default, (fields, "auto"))
    torch.library.opcheck(torch.ops.ninerank.fm_interaction_backward.default, (_draw(3, 1), fields.detach(), "auto"))
    torch.library.opcheck(torch.ops.ninerank.dot_interaction_backward.default, (_draw(3, 6), fields.detach(), "auto"))
    torch.library.opcheck(torch.ops.ninerank.low_rank_cross.default, (*(v.requires_grad_() for v in _cross_case(4, 8, 2, 0)), "auto"))
