from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.embedding.pooling import Padding, pool_rows

LENGTHS = st.lists(st.integers(0, 4), min_size=0, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, dim=st.integers(1, 5))
def test_pooled_bags_equal_loops_and_their_gradient_checks(lengths: list[int], dim: int) -> None:
    rows = torch.randn(sum(lengths), dim, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, *accumulate(lengths)])
    pooled = pool_rows(rows, offsets, 1).squeeze(1)
    assert pooled.shape == (len(lengths), dim)
    start = 0
    for length, bag in zip(lengths, pooled, strict=True):
        want = torch.zeros(dim, dtype=torch.float64)
        for row in rows[start : start + length]:
            want = want + row
        torch.testing.assert_close(bag, want)
        start += length
    if rows.numel():
        assert torch.autograd.gradcheck(lambda r: pool_rows(r, offsets, 1), (rows,))


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(0, 4), features=st.integers(1, 3), spare=st.integers(0, 2), seed=st.integers(0, 999))
def test_padding_puts_every_id_where_it_belongs(num_rows: int, features: int, spare: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    length_M = torch.randint(0, 4, (features * num_rows,), generator=draw)
    widths = [max(1, *own, 1) + spare for own in length_M.view(features, num_rows).tolist()]
    total = int(length_M.sum())
    rows = torch.arange(1, total + 1, dtype=torch.float64)[:, None].requires_grad_()
    padding = Padding.of(length_M, total, num_rows, widths)
    padded = padding.pad(rows)
    value = 0
    for f, (array, mask, width) in enumerate(zip(padded, padding.masks, widths, strict=True)):
        assert array.shape == (num_rows, width, 1)
        for r in range(num_rows):
            own = int(length_M[f * num_rows + r])
            assert array[r, :, 0].tolist() == [*range(value + 1, value + own + 1), *[0] * (width - own)]
            assert mask[r].tolist() == [True] * own + [False] * (width - own)
            value += own
    if total:
        torch.cat([array.flatten() for array in padded]).square().sum().backward()
        torch.testing.assert_close(rows.grad, 2 * rows.detach())


def test_static_padding_needs_no_values() -> None:
    """Lengths on the meta device: all shapes follow from the number of ids and the widths, as traces for static backends need."""
    with torch.device("meta"):
        padding = Padding.of(torch.zeros(6, dtype=torch.int64), 5, 3, [4, 2])
        padded = padding.pad(torch.zeros(5, 2))
    assert [tuple(array.shape) for array in padded] == [(3, 4, 2), (3, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooling_keeps_the_dtype(dtype: torch.dtype) -> None:
    rows = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    pooled = pool_rows(rows, torch.tensor([0, 2, 2, 3]), 1)
    assert pooled.dtype == dtype
    assert pooled.squeeze(1).tolist() == [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
