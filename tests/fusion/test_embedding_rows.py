"""Ids become rows of the merged storage, and ids outside their table are refused, clamped or dropped as the table says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.fusion.kernels.embedding_rows import IdRangeError, OutOfRange, embedding_rows, reference, row_dtype

FIRST, SIZES = torch.tensor([0, 10, 13]), torch.tensor([10, 3, 7])
STORAGE_ROWS = 20


@settings(max_examples=200)
@given(st.integers(0, 2**31), st.integers(0, 30), st.sampled_from([torch.int32, torch.int64]), st.booleans())
def test_agrees_with_reference(seed: int, num_bags: int, dtype: torch.dtype, jagged: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (3 * num_bags,), generator=generator) if jagged else torch.ones(3 * num_bags, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = torch.randint(-5, 25, (int(offsets[-1]),), generator=generator).to(dtype)
    policy = torch.tensor([OutOfRange.CLAMP, OutOfRange.DEFAULT, OutOfRange.CLAMP], dtype=torch.uint8)
    arguments = (values, offsets if jagged else None, FIRST, SIZES, policy, STORAGE_ROWS)
    found = embedding_rows(*arguments)
    assert found.dtype == torch.int32
    assert torch.equal(found, reference(*arguments))
    feature = torch.repeat_interleave(torch.arange(3), lengths.view(3, -1).sum(1))
    assert bool(((found >= FIRST[feature]) & (found < (FIRST + SIZES)[feature])).all())


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [3, -1, 2**40])
def test_an_id_outside_its_table_is_named(kernel: str, bad: int, num_threads: int) -> None:
    values = torch.tensor([0, 9, 2, bad, bad, 6])
    with pytest.raises(
        IdRangeError, match=rf"feature 'item': id {bad} \(number 3 of the batch\) is outside its table of 3 rows; allowed: 0 to 2"
    ):
        embedding_rows(values, None, FIRST, SIZES, None, STORAGE_ROWS, names=("user", "item", "hour"), kernel=kernel)
    offsets = torch.tensor([0, 0, 2, 2, 5, 5, 6])
    with pytest.raises(IdRangeError, match="feature number 1"):
        embedding_rows(values, offsets, FIRST, SIZES, None, STORAGE_ROWS, kernel=kernel)


def test_policy_is_per_feature() -> None:
    values, policy = torch.tensor([99, 99, -4]), torch.tensor([1, 2, 1], dtype=torch.uint8)
    assert embedding_rows(values, None, FIRST, SIZES, policy, STORAGE_ROWS).tolist() == [9, 10, 13]


def test_huge_storages_take_wide_rows() -> None:
    assert (row_dtype(2**31 - 1), row_dtype(2**31)) == (torch.int32, torch.int64)
    rows = embedding_rows(torch.tensor([5]), None, torch.tensor([2**33]), torch.tensor([6]), None, 2**34)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [2**33 + 5]


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_no_bags(kernel: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert embedding_rows(empty, None, FIRST, SIZES, None, STORAGE_ROWS, kernel=kernel).numel() == 0
    assert embedding_rows(empty, torch.zeros(1, dtype=torch.int64), FIRST, SIZES, None, STORAGE_ROWS, kernel=kernel).numel() == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="do not share out over 3 features"):
        embedding_rows(torch.tensor([1, 2]), None, FIRST, SIZES, None, STORAGE_ROWS)
    with pytest.raises(ValueError, match="offsets end at 2, there are 3 ids"):
        embedding_rows(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1, 2]), FIRST, SIZES, None, STORAGE_ROWS)
    with pytest.raises(TypeError, match=r"ids are torch.float32; allowed: torch.int32, torch.int64"):
        embedding_rows(torch.ones(3), None, FIRST, SIZES, None, STORAGE_ROWS)


def test_operator_contract() -> None:
    values = torch.tensor([0, 2, 1])
    torch.library.opcheck(torch.ops.ninerank.embedding_rows.default, (values, None, FIRST, SIZES, None, STORAGE_ROWS, "auto"))
