import pytest
import torch

from ninerank.embedding.pending import PendingGradients
from ninerank.fusion.kernels.embedding_update import SGD
from ninerank.fusion.lookup import LookupGrad


def grad(rows: list[int], values: list[float], **entries: torch.Tensor) -> LookupGrad:
    return LookupGrad(torch.tensor(values)[:, None], torch.tensor(rows), **entries)


def test_each_row_is_summed_once_over_all_lookups() -> None:
    pending = PendingGradients()
    assert pending.coalesced(10) is None
    assert not pending
    pending.add(grad([5, 2, 5], [1.0, 10.0, 2.0]))
    pending.add(grad([2, 9], [100.0, 4.0]))
    summed = pending.coalesced(10)
    assert summed is not None
    assert summed.rows_N.tolist() == [2, 5, 9]
    assert summed.grad_GD.tolist() == [[110.0], [3.0], [4.0]]
    pending.clear()
    assert pending.coalesced(10) is None


def test_scaling_reaches_the_sums_and_the_update_and_refuses_what_comes_after() -> None:
    weights = []
    for ask_for_sums in (False, True):
        pending, weight = PendingGradients(), torch.zeros(10, 1)
        pending.add(grad([5, 2, 5], [1.0, 10.0, 2.0]))
        pending.scale_(0.5)
        pending.scale_(torch.tensor(0.5))
        with pytest.raises(RuntimeError, match="after a scaling"):
            pending.add(grad([1], [1.0]))
        if ask_for_sums:
            summed = pending.coalesced(10)
            assert summed is not None
            assert summed.grad_GD.flatten().tolist() == [2.5, 0.75]
        pending.apply(weight, [], torch.tensor([0]), torch.tensor([1.0]), SGD())
        weights.append(weight)
    assert torch.equal(*weights)
    assert weights[0].flatten().nonzero().flatten().tolist() == [2, 5]


def test_the_skipped_row_takes_nothing() -> None:
    entries = {"grad_row_N": torch.tensor([1, 0, 1], dtype=torch.int32), "scale_N": torch.tensor([1.0, 2.0, 3.0])}
    for more in ({}, entries):
        pending = PendingGradients(skip_row=0)
        pending.add(grad([4, 0, 4], [1.0, 10.0, 100.0], **more))
        summed = pending.coalesced(10)
        assert summed is not None
        assert summed.rows_N.tolist() == [4]
        assert summed.grad_GD.item() == (40.0 if more else 101.0)
        pending.clear()
        pending.add(grad([0, 0], [1.0, 1.0]))
        assert not pending
        assert pending.coalesced(10) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_summing_gives_the_same_bits_every_time(threads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    row_N, grad_ND = torch.randint(0, 300, (20_000,), generator=draw), torch.randn(20_000, 16, generator=draw)
    before = torch.get_num_threads()

    def sums() -> torch.Tensor:
        pending = PendingGradients()
        pending.add(LookupGrad(grad_ND, row_N))
        summed = pending.coalesced(300)
        assert summed is not None
        return summed.grad_GD

    torch.set_num_threads(1)
    want = sums()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert torch.equal(sums(), want)
    finally:
        torch.set_num_threads(before)
    reference = torch.zeros(300, 16, dtype=torch.float64).index_add(0, row_N, grad_ND.double())
    torch.testing.assert_close(want.double(), reference[row_N.unique()], atol=1e-4, rtol=1e-5)
