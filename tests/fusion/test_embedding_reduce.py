"""Each touched row's gradient is summed once, in one order, whatever the number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.fusion.kernels.embedding_reduce import embedding_reduce

ROW_COUNTS = (1, 2, 2048, 2049, 100_000, 2**22, 2**22 + 1, 2**26)


@settings(max_examples=250)
@given(
    st.integers(0, 2**31),
    st.integers(0, 400),
    st.sampled_from(ROW_COUNTS),
    st.sampled_from([1, 3, 10**9]),
    st.sampled_from(
        [(16, torch.int32, True, False), (16, torch.int64, False, False), (3, torch.int32, True, True), (1, torch.int32, False, True)]
    ),
)
def test_agrees_with_float64_reference(
    seed: int, entries: int, num_rows: int, hot: int, variant: tuple[int, torch.dtype, bool, bool]
) -> None:
    dim, row_type, mapped, scaled = variant
    generator = torch.Generator().manual_seed(seed)
    outputs = int(torch.randint(1, 50, (), generator=generator)) if mapped else entries
    grad = torch.randn(outputs, dim, generator=generator)
    # Hot rows lie anywhere in the storage, so that every digit of the sort is met.
    pool = torch.randint(0, num_rows, (min(hot, max(entries, 1)),), generator=generator)
    rows = pool[torch.randint(0, pool.numel(), (entries,), generator=generator)].to(row_type)
    grad_row = torch.randint(0, outputs, (entries,), generator=generator).to(torch.int32) if mapped else None
    scale = torch.randn(entries, generator=generator) if scaled else None
    found_rows, found = embedding_reduce(grad, rows, grad_row, scale, num_rows, kernel="numba")
    expected_rows, expected = embedding_reduce(grad.double(), rows, grad_row, scale, num_rows, kernel="torch")
    assert torch.equal(found_rows, expected_rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)


def test_same_bits_for_any_number_of_threads(num_threads: int) -> None:
    generator = torch.Generator().manual_seed(11)
    grad = torch.randn(5000, 16, generator=generator)
    rows = (torch.rand(5000, generator=generator) ** 6 * 3_000_000).to(torch.int32)
    unique, sums = embedding_reduce(grad, rows, None, None, 3_000_000)
    assert torch.equal(unique, torch.unique(rows))
    if num_threads == 1:
        _ANSWERS["one thread"] = sums
    assert torch.equal(sums, _ANSWERS["one thread"])


_ANSWERS: dict[str, torch.Tensor] = {}


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [9, -1])
def test_a_row_outside_the_storage_is_refused(kernel: str, bad: int, num_threads: int) -> None:
    with pytest.raises(IndexError, match=r"row"):
        embedding_reduce(torch.ones(3, 16), torch.tensor([0, bad, 8]), None, None, 9, kernel=kernel)


def test_an_output_that_is_not_there_is_refused() -> None:
    with pytest.raises(IndexError, match="entries go into outputs -1 to 3; there are 3"):
        embedding_reduce(torch.ones(3, 16), torch.tensor([0, 1]), torch.tensor([3, -1], dtype=torch.int32), None, 9)


def test_wrong_shapes_are_refused() -> None:
    rows = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="2 entries and 3 gradients"):
        embedding_reduce(torch.ones(3, 16), rows, None, None, 9)
    with pytest.raises(ValueError, match=r"grad_row_N is torch.int64"):
        embedding_reduce(torch.ones(3, 16), rows, torch.tensor([0, 1]), None, 9)
    with pytest.raises(ValueError, match="scale_N has shape"):
        embedding_reduce(torch.ones(2, 16), rows, None, torch.ones(3), 9)


def test_operator_contract() -> None:
    arguments = (torch.randn(3, 16), torch.tensor([0, 7, 7]), torch.tensor([2, 2, 1], dtype=torch.int32), None, 9, "auto")
    torch.library.opcheck(torch.ops.ninerank.embedding_reduce.default, arguments, test_utils=("test_schema", "test_faketensor"))
