"""Gradients of lookups reach the fused optimizer once, and only there."""

import pytest
import torch

from ninerank.fusion.kernels.embedding_update import SGD, RowwiseAdagrad
from ninerank.fusion.lookup import LookupGrad, pooled, sequence

FIRST, LR = torch.tensor([0]), torch.tensor([0.1])


def test_pooled_update_equals_a_dense_step() -> None:
    weight = torch.nn.Parameter(torch.randn(9, 16))
    dense = torch.nn.Parameter(weight.detach().clone())
    rows, offsets, mean = torch.tensor([1, 1, 8, 0, 4]), torch.tensor([0, 3, 3, 4, 5]), torch.tensor([True, False])
    pending: list[LookupGrad] = []
    out = pooled(weight, rows, offsets, 2, mean_F=mean, on_grad=pending.append)
    by_hand = torch.stack([dense[[1, 1, 8]].mean(0), dense[0], torch.zeros(16), dense[4]]).view(2, 2, 16)
    torch.testing.assert_close(out, by_hand)
    coefficient = torch.randn(2, 2, 16)
    (out * coefficient).sum().backward()
    (by_hand * coefficient).sum().backward()
    assert weight.grad is None
    assert dense.grad is not None
    pending[0].apply(weight, [], FIRST, LR, SGD())
    torch.testing.assert_close(weight.detach(), dense.detach() - 0.1 * dense.grad)


@pytest.mark.parametrize("feature_major", [True, False])
def test_rows_that_two_lookups_share_are_updated_once(feature_major: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(9, 16))
    reference = weight.detach().clone()
    single, history, offsets = torch.tensor([3, 5, 3, 8]), torch.tensor([5, 3, 3]), torch.tensor([0, 1, 3])
    pending: list[LookupGrad] = []
    out = pooled(weight, single, None, 2, feature_major=feature_major, on_grad=pending.append)
    past = sequence(weight, history, offsets, 4, on_grad=pending.append)
    flat = sequence(weight, history, on_grad=pending.append)
    (out.sum() + 2 * past.sum() + 4 * flat.sum()).backward()
    state = RowwiseAdagrad().new_state(weight, LR)
    merged = LookupGrad.merged(pending)
    sums = merged.coalesced(9)
    assert sums.rows_N.tolist() == [3, 5, 8]
    assert sums.grad_GD[:, 0].tolist() == [2 + 4 + 8, 1 + 2 + 4, 1]
    merged.apply(weight, state, FIRST, LR, RowwiseAdagrad())
    assert state[0].tolist() == [0, 0, 0, 196, 0, 49, 0, 0, 1]
    again, again_state = reference.clone(), RowwiseAdagrad().new_state(weight, LR)
    sums.apply(again, again_state, FIRST, LR, RowwiseAdagrad())
    assert torch.equal(again, weight.detach())
    torch.testing.assert_close(weight.detach()[[3, 5, 8]], reference[[3, 5, 8]] - 0.1)


def test_scales_of_one_lookup_do_not_leak_into_another() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 16))
    pending: list[LookupGrad] = []
    weighted = pooled(weight, torch.tensor([1, 2]), None, 1, sample_weight_N=torch.tensor([3.0, 5.0]), on_grad=pending.append)
    plain = pooled(weight, torch.tensor([2, 2]), None, 1, on_grad=pending.append)
    (weighted.sum() + plain.sum()).backward()
    assert LookupGrad.merged(pending).coalesced(4).grad_GD[:, 0].tolist() == [3, 7]


def test_nothing_is_recorded_without_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 16))
    with torch.no_grad():
        assert not pooled(weight, torch.tensor([1]), None, 1, on_grad=_fail).requires_grad
    assert not pooled(weight.detach(), torch.tensor([1]), None, 1, on_grad=_fail).requires_grad


def _fail(grad: LookupGrad) -> None:
    raise AssertionError("no gradient was asked for")


def test_update_inside_backward() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 16))
    out = pooled(weight, torch.tensor([2, 2]), None, 1, on_grad=lambda grad: grad.apply(weight, [], FIRST, LR, SGD()))
    out.sum().backward()
    torch.testing.assert_close(weight.detach()[:, 0], torch.tensor([1.0, 1.0, 0.8, 1.0]))


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no lookup has a gradient"):
        LookupGrad.merged([])
