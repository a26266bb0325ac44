"""Operators on jagged histories against float64 references, numeric gradients, and one another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.jagged import expanded, history_of
from ninerank.fusion.kernels.jagged_attention import jagged_attention
from ninerank.fusion.kernels.jagged_pairs import jagged_pairs

DIMS = (1, 3, 4, 7, 8, 16, 17, 100)


def _offsets(lengths: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(dtype)


def _case(num_histories: int, longest: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, score and offsets; every third history is empty, and one is long."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (num_histories,), generator=generator)
    lengths[::3] = 0
    lengths[num_histories // 2 : num_histories // 2 + 1] *= 20
    count = int(lengths.sum())
    query, key = torch.randn(num_histories, dim, generator=generator), torch.randn(count, dim, generator=generator)
    return query, key, torch.randn(count, generator=generator) * 3, _offsets(lengths)


def _exact(*values: Tensor) -> list[Tensor]:
    return [value.double().requires_grad_() for value in values]


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=1e-4)


@settings(max_examples=120)
@given(
    *(st.integers(0, 20), st.sampled_from([0, 1, 3, 30]), st.sampled_from(DIMS)),
    *(st.sampled_from([torch.int32, torch.int64]), st.integers(0, 2**31)),
)
def test_pairs_agree_with_float64(num_histories: int, longest: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    query, key, _, offsets = _case(num_histories, longest, dim, seed)
    exact_query, exact_key = _exact(query, key)
    expected = jagged_pairs(exact_query, exact_key, offsets, kernel="torch")
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed))
    expected.backward(grad.double())
    query, key = query.requires_grad_(), key.requires_grad_()
    with registry.count_dispatches() as counts:
        found = jagged_pairs(query, key, offsets.to(dtype))
        found.backward(grad)
    assert set(counts) == {("jagged_pairs", "numba"), ("jagged_pairs_backward", "numba")}
    _close(found, expected)
    _close(query.grad, exact_query.grad)
    _close(key.grad, exact_key.grad)


@settings(max_examples=120)
@given(
    *(st.integers(0, 20), st.sampled_from([0, 1, 3, 30]), st.sampled_from(DIMS), st.booleans()),
    *(st.sampled_from([torch.int32, torch.int64]), st.integers(0, 2**31)),
)
def test_attention_agrees_with_float64(num_histories: int, longest: int, dim: int, softmax: bool, dtype: torch.dtype, seed: int) -> None:
    query, key, score, offsets = _case(num_histories, longest, dim, seed)
    exact_score, exact_key = _exact(score, key)
    expected = jagged_attention(exact_score, exact_key, offsets, softmax=softmax, kernel="torch")
    expected.backward(query.double())
    score, key = score.requires_grad_(), key.requires_grad_()
    found = jagged_attention(score, key, offsets.to(dtype), softmax=softmax, kernel="numba")
    found.backward(query)
    _close(found, expected)
    _close(score.grad, exact_score.grad)
    _close(key.grad, exact_key.grad)


@pytest.mark.parametrize("softmax", [False, True])
def test_references_are_what_autograd_makes_of_plain_torch(softmax: bool) -> None:
    query, key, score, offsets = _case(7, 4, 3, 1)
    query, key, score = _exact(query, key, score)
    history = history_of(offsets, len(key))

    def plain() -> tuple[Tensor, Tensor]:
        rows = []
        for own in range(len(query)):
            kept = history == own
            weight = score[kept].softmax(0) if softmax else score[kept]
            rows.append((weight[:, None] * key[kept]).sum(0))
        own_query = query[history]
        return torch.stack(rows), torch.cat([own_query, key, own_query * key], dim=1)

    found = jagged_attention(score, key, offsets, softmax=softmax, kernel="torch"), jagged_pairs(query, key, offsets, kernel="torch")
    for ours, theirs in zip(found, plain(), strict=True):
        grad = torch.randn(ours.shape, dtype=torch.float64)
        torch.testing.assert_close(ours, theirs)
        for one, other in zip(
            torch.autograd.grad(ours, (query, key, score), grad, allow_unused=True),
            torch.autograd.grad(theirs, (query, key, score), grad, allow_unused=True),
            strict=True,
        ):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("softmax", [False, True])
def test_gradcheck(softmax: bool) -> None:
    query, key, score, offsets = _case(6, 3, 3, 2)
    query, key, score = _exact(query, key, score)
    assert torch.autograd.gradcheck(lambda q, k: jagged_pairs(q, k, offsets, kernel="torch"), (query, key))
    assert torch.autograd.gradcheck(lambda s, k: jagged_attention(s, k, offsets, softmax=softmax, kernel="torch"), (score, key))


def _all_of_it(query: Tensor, key: Tensor, score: Tensor, offsets: Tensor, softmax: bool) -> list[Tensor]:
    """Both operators and the gradients of query, key and score."""
    values = [value.detach().requires_grad_() for value in (query, key, score)]
    outs = jagged_pairs(*values[:2], offsets), jagged_attention(values[2], values[1], offsets, softmax=softmax)
    return [*outs, *torch.autograd.grad(outs, values, [torch.ones_like(outs[0]), outs[1].detach()])]


@pytest.mark.parametrize("softmax", [False, True])
def test_same_bits_for_any_number_of_threads(softmax: bool, num_threads: int) -> None:
    query, key, score, offsets = _case(50, 12, 16, 3)
    pairs, sums, query_grad, key_grad, score_grad = _all_of_it(query, key, score, offsets, softmax)
    for own, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = _all_of_it(query[own : own + 1], key[begin:end], score[begin:end], torch.tensor([0, end - begin]), softmax)
        together = (pairs[begin:end], sums[own : own + 1], query_grad[own : own + 1], key_grad[begin:end], score_grad[begin:end])
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_score_of_any_size_has_a_softmax() -> None:
    score, key, offsets = torch.tensor([1e30, -1e30, -3e38, 3e38]), torch.eye(4), torch.tensor([0, 2, 4])
    assert jagged_attention(score, key, offsets, softmax=True).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    diverged = jagged_attention(torch.tensor([float("nan"), 1.0, 2.0, 3.0]), key, offsets, softmax=True)
    assert diverged[0].isnan().any()
    assert not diverged[1].isnan().any()


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 2**31))
def test_a_shared_history_is_as_if_each_candidate_had_its_own(num_histories: int, candidates: int, seed: int) -> None:
    _, key, score, offsets = _case(num_histories, 4, 4, seed)
    row = torch.randint(0, num_histories, (candidates,), generator=torch.Generator().manual_seed(seed))
    positions, own = expanded(offsets, row)
    found = jagged_attention(score[positions], key[positions], own)
    torch.testing.assert_close(found, jagged_attention(score, key, offsets)[row])


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 2]), "from 0 to the 3 positions"),
        (torch.tensor([1, 3]), "offsets go from 1"),
        (torch.tensor([0, 5, 3]), r"\(2,\) is needed|without falling"),
        (torch.tensor([0.0, 3.0]), "torch.int32 or torch.int64"),
    ],
)
def test_wrong_offsets_are_refused(offsets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jagged_pairs(torch.ones(1, 4), torch.ones(3, 4), offsets)
    with pytest.raises(ValueError, match=message):
        jagged_attention(torch.ones(3), torch.ones(3, 4), offsets)


def test_wrong_values_are_refused() -> None:
    offsets = torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"\(B, D\) and \(N, D\)"):
        jagged_pairs(torch.ones(1, 3), torch.ones(3, 4), offsets)
    with pytest.raises(ValueError, match="float64 for kernel 'torch'"):
        jagged_pairs(torch.ones(1, 4).double(), torch.ones(3, 4).double(), offsets, kernel="numba")
    with pytest.raises(ValueError, match=r"\(N,\) and \(N, D\)"):
        jagged_attention(torch.ones(2), torch.ones(3, 4), offsets)
    with pytest.raises(ValueError, match="score torch.bfloat16"):
        jagged_attention(torch.ones(3).bfloat16(), torch.ones(3, 4), offsets)


def test_operator_contract() -> None:
    query, key, score, offsets = _case(5, 3, 8, 4)
    values = [value.requires_grad_() for value in (query, key, score)]
    torch.library.opcheck(torch.ops.ninerank.jagged_pairs.default, (values[0], values[1], offsets, "auto"))
    torch.library.opcheck(torch.ops.ninerank.jagged_attention.default, (values[2], values[1], offsets, True, "auto"))
    grad = torch.randn(len(key), 24)
    torch.library.opcheck(torch.ops.ninerank.jagged_pairs_backward.default, (grad, query.detach(), key.detach(), offsets, "auto"))
    torch.library.opcheck(
        torch.ops.ninerank.jagged_attention_backward.default, (query.detach(), score.detach(), key.detach(), offsets, False, "auto")
    )
