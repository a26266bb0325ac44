"""Lookup without pooling, flat and padded, against its reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.fusion.kernels.embedding_sequence import embedding_sequence, sequence_entries

VARIANTS = (
    (16, torch.float32, torch.int32, torch.int64),
    (16, torch.float32, torch.int64, None),
    (3, torch.float32, torch.int32, torch.int64),
    (16, torch.float16, torch.int32, torch.int32),
    (1, torch.bfloat16, torch.int32, None),
)


@settings(max_examples=200)
@given(
    st.sampled_from(VARIANTS), st.integers(0, 2**31), st.integers(0, 30), st.integers(0, 9), st.sampled_from([1, 2, 500]), st.integers(0, 2)
)
def test_agrees_with_reference(
    variant: tuple[int, torch.dtype, torch.dtype, torch.dtype | None], seed: int, sequences: int, longest: int, num_rows: int, spare: int
) -> None:
    dim, table, row_type, offset_type = variant
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (sequences,), generator=generator)
    offsets = None if offset_type is None else torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(offset_type)
    weight = torch.randn(num_rows, dim, generator=generator).to(table)
    rows = torch.randint(0, num_rows, (int(lengths.sum()),), generator=generator).to(row_type)
    found = embedding_sequence(weight, rows, offsets, longest + spare, kernel="numba")
    assert torch.equal(found, embedding_sequence(weight, rows, offsets, longest + spare, kernel="torch"))
    assert found.shape == ((rows.numel(), dim) if offsets is None else (sequences, longest + spare, dim))


def test_padding_is_zero_and_order_is_kept(num_threads: int) -> None:
    weight = torch.arange(1.0, 7.0)[:, None]
    out = embedding_sequence(weight, torch.tensor([5, 0, 1, 2]), torch.tensor([0, 1, 1, 4]), 4)
    assert out.squeeze(-1).tolist() == [[6, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 0]]


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_too_long_a_sequence_is_refused(kernel: str) -> None:
    with pytest.raises(ValueError, match="a sequence has 3 ids, more than max_length 2"):
        embedding_sequence(torch.zeros(4, 1), torch.tensor([0, 1, 2]), torch.tensor([0, 3]), 2, kernel=kernel)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [4, -1])
def test_a_row_outside_the_storage_is_refused(kernel: str, bad: int) -> None:
    with pytest.raises(IndexError):
        embedding_sequence(torch.zeros(4, 1), torch.tensor([0, bad], dtype=torch.int32), kernel=kernel)


def test_entries_are_where_the_ids_went() -> None:
    offsets, rows = torch.tensor([0, 2, 2, 5]), torch.tensor([4, 1, 0, 2, 3])
    weight = torch.arange(1.0, 6.0)[:, None]
    padded = embedding_sequence(weight, rows, offsets, 3).view(-1)
    assert torch.equal(padded[sequence_entries(offsets, 3, 5).long()], weight[rows].view(-1))


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("padded", [True, False])
def test_dense_gradient(kernel: str, padded: bool) -> None:
    weight = torch.randn(6, 16, requires_grad=True)
    rows, offsets = torch.tensor([5, 1, 1, 5, 5]), torch.tensor([0, 1, 5])
    out = embedding_sequence(weight, rows, offsets, 4, kernel=kernel) if padded else embedding_sequence(weight, rows, kernel=kernel)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0, 2, 0, 0, 0, 3]


def test_operator_contract() -> None:
    weight, rows = torch.randn(5, 16, requires_grad=True), torch.tensor([0, 4, 4, 1])
    torch.library.opcheck(torch.ops.ninerank.embedding_sequence.default, (weight, rows, torch.tensor([0, 3, 4]), 3, "auto"))
    torch.library.opcheck(torch.ops.ninerank.embedding_sequence.default, (weight, rows, None, 0, "auto"))
