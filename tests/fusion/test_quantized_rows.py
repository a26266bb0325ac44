"""Lookup of 8-bit and 4-bit rows against its reference and against codes written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.fusion.kernels.quantized_rows import quantized_rows, row_bytes

DIMS = (1, 2, 3, 5, 7, 8, 10, 15, 16, 17, 24, 64, 100)


def _random_storage(num_rows: int, dim: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randint(0, 256, (num_rows, row_bytes(dim, bits)), generator=generator, dtype=torch.uint8)
    storage.view(torch.float32)[:, :2] = torch.randn(num_rows, 2, generator=generator)
    return storage


@settings(max_examples=250)
@given(
    st.sampled_from([8, 4]),
    st.sampled_from(DIMS),
    st.sampled_from([1, 2, 300]),
    st.integers(0, 200),
    st.sampled_from([1, 300]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 2**31),
)
def test_agrees_with_reference(bits: int, dim: int, num_rows: int, count: int, hot: int, row_type: torch.dtype, seed: int) -> None:
    storage = _random_storage(num_rows, dim, bits, seed)
    rows = torch.randint(0, min(hot, num_rows), (count,), generator=torch.Generator().manual_seed(seed)).to(row_type)
    found = quantized_rows(storage, rows, dim, bits, kernel="numba")
    torch.testing.assert_close(found, quantized_rows(storage, rows, dim, bits, kernel="torch"), rtol=2e-7, atol=6e-5)
    assert found.shape == (count, dim)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [(8, [0, 1, 255, 0], [-1.0, -0.5, 126.5]), (4, [0x20, 0x0F, 0, 0], [-1.0, 6.5, 0.0]), (4, [0xF1, 0, 0, 0], [-0.5, 6.5])],
)
def test_the_layout_is_the_contracts(kernel: str, bits: int, codes: list[int], expected: list[float]) -> None:
    storage = torch.cat([torch.tensor([[0.5, -1.0]]).view(torch.uint8), torch.tensor([codes], dtype=torch.uint8)], dim=1)
    assert quantized_rows(storage, torch.tensor([0]), len(expected), bits, kernel=kernel).tolist() == [expected]


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_scale_of_zero_gives_the_bias_exactly(kernel: str, bits: int) -> None:
    storage = torch.full((3, row_bytes(16, bits)), 255, dtype=torch.uint8)
    storage.view(torch.float32)[:, :2] = torch.tensor([[0.0, 0.1], [0.0, -1e-38], [0.0, 3e38]])
    found = quantized_rows(storage, torch.tensor([2, 0, 1]), 16, bits, kernel=kernel)
    assert torch.equal(found, storage.view(torch.float32)[[2, 0, 1], 1:2].expand(3, 16))


@pytest.mark.parametrize("bits", [8, 4])
def test_same_bits_for_any_number_of_threads(bits: int, num_threads: int) -> None:
    storage, rows = _random_storage(500, 16, bits, 1), torch.randint(0, 500, (333,), generator=torch.Generator().manual_seed(2))
    one_by_one = torch.cat([quantized_rows(storage, row[None], 16, bits) for row in rows])
    assert torch.equal(quantized_rows(storage, rows, 16, bits), one_by_one)


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("bad", [-1, 4])
def test_a_row_outside_the_storage_is_refused(kernel: str, bad: int) -> None:
    with pytest.raises(IndexError):
        quantized_rows(_random_storage(4, 16, 8, 0), torch.tensor([0, bad]), 16, 8, kernel=kernel)


@pytest.mark.parametrize(
    ("storage", "rows", "dim", "bits", "message"),
    [
        (torch.zeros(4, 24, dtype=torch.uint8), torch.tensor([0]), 16, 3, "codes of 3 bits"),
        (torch.zeros(4, 24, dtype=torch.uint8), torch.tensor([0]), 0, 8, "dim 0"),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.tensor([0]), 16, 8, r"\(rows, 24\) is needed for dim 16 in 8 bits"),
        (torch.zeros(4, 24), torch.tensor([0]), 16, 8, r"torch.float32 \(4, 24\)"),
        (torch.zeros(24, 24, dtype=torch.uint8).t(), torch.tensor([0]), 16, 8, "contiguous"),
        (torch.zeros(4, 24, dtype=torch.uint8), torch.tensor([0.0]), 16, 8, "torch.int32 or torch.int64"),
    ],
)
def test_wrong_arguments_are_refused(storage: Tensor, rows: Tensor, dim: int, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantized_rows(storage, rows, dim, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_operator_contract(bits: int) -> None:
    arguments = (_random_storage(5, 16, bits, 0), torch.tensor([0, 4, 4, 1]), 16, bits, "auto")
    torch.library.opcheck(torch.ops.ninerank.quantized_rows.default, arguments)
