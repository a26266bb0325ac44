"""Tables in fewer bits: within the stated error, exact where a row has one value, refused where they cannot be held."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.embedding import quantize as module
from ninerank.embedding.quantize import QuantizedGroup, QuantizedTable, TableDtype, check_dtype, error_bound, quantize, stored_dtype
from ninerank.embedding.table import TableLayout
from ninerank.errors import DataError, SpecError

DTYPES: tuple[TableDtype, ...] = get_args(TableDtype)
DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 64)


def _table(num_rows: int, dim: int, spread: float, centre: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return centre + spread * torch.randn(num_rows, dim, generator=generator)


@settings(max_examples=250)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DIMS),
    st.sampled_from([1, 2, 50]),
    st.sampled_from([0.0, 1e-44, 1e-38, 1e-6, 0.01, 1.0, 1e3]),
    st.sampled_from([0.0, 1e-6, -1.0, 300.0]),
    st.integers(0, 2**31),
)
def test_error_is_within_the_bound(dtype: TableDtype, dim: int, num_rows: int, spread: float, centre: float, seed: int) -> None:
    table = _table(num_rows, dim, spread, centre, seed)
    stored = quantize(table, dtype)
    error = (stored.dequantized().double() - table.double()).abs().amax(1)
    assert bool((error <= error_bound(table.amin(1), table.amax(1), dtype)).all())


@settings(max_examples=100)
@given(st.sampled_from(["int8", "int4"]), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_any_numbers_are_within_the_bound_or_refused(dtype: TableDtype, values: list[float]) -> None:
    table = torch.tensor([values], dtype=torch.float32)
    if float(table.abs().max()) > float(torch.finfo(torch.float32).max / 2):
        with pytest.raises(DataError, match="holds numbers up to"):
            quantize(table, dtype)
        return
    found = quantize(table, dtype).dequantized()
    assert float((found.double() - table.double()).abs().max()) <= float(error_bound(table.min(), table.max(), dtype))


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp32"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e-5, 1e-42, 1.2e38])
def test_rows_of_one_value_come_back_exactly(dtype: TableDtype, value: float) -> None:
    table = torch.full((3, 15), value)
    assert torch.equal(quantize(table, dtype).dequantized(), table)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_ends_of_a_row_come_back(dtype: TableDtype) -> None:
    table = _table(200, 16, 0.01, 0.0, 3)
    found = quantize(table, dtype).dequantized()
    torch.testing.assert_close(found.amin(1), table.amin(1), rtol=0, atol=0)
    torch.testing.assert_close(found.amax(1), table.amax(1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_row(dtype: TableDtype, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 64)
    table = torch.zeros(100, 16)
    table[37, 5] = bad
    with pytest.raises(DataError, match=rf"group deep, table user: row 37, column 5 is {bad}; tables hold finite numbers"):
        quantize(table, dtype, name="group deep, table user")


@pytest.mark.parametrize(("dtype", "value"), [("fp16", 65505.0), ("fp16", -1e9), ("int8", 3e38), ("int4", -2e38)])
def test_what_a_type_cannot_hold_is_refused_by_row(dtype: TableDtype, value: float) -> None:
    table = torch.zeros(3, 16)
    table[2, 0] = value
    with pytest.raises(DataError, match=rf"row 2, column 0 is .*; {dtype} holds numbers up to"):
        quantize(table, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_do_not_show(dtype: TableDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(1000, 15, 1.0, 0.0, 5)
    whole = quantize(table, dtype).storage_VS
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 100)
    out = torch.full_like(whole, 77)
    assert quantize(table, dtype, out=out).storage_VS is out
    assert torch.equal(out, whole)


def test_bytes_of_a_row() -> None:
    rows = {dtype: quantize(torch.zeros(10, 64), dtype).storage_VS for dtype in DTYPES}
    assert {dtype: rows[dtype][0].nbytes for dtype in DTYPES} == {"fp32": 256, "fp16": 128, "int8": 72, "int4": 40}


@pytest.mark.parametrize(
    ("dtype", "dim", "stored"),
    [("int8", 1, "fp16"), ("int8", 8, "fp16"), ("int8", 12, "int8"), ("int4", 6, "fp16"), ("int4", 8, "int4"), ("fp16", 1, "fp16")],
)
def test_short_rows_are_stored_in_sixteen_bits(dtype: TableDtype, dim: int, stored: TableDtype) -> None:
    assert stored_dtype(dtype, dim) == stored


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_reads_rows_of_its_tables(dtype: TableDtype) -> None:
    layout = TableLayout.of({"user": 3, "item": 5})
    table = _table(8, 16, 0.1, 0.0, 1)
    group = QuantizedGroup("deep", layout, quantize(table, dtype)).eval()
    row_N = torch.tensor([7, 0, 3, 3])
    expected = quantize(table, dtype).dequantized()
    assert torch.equal(group.rows(row_N), expected[row_N])
    assert torch.equal(group.table("item"), expected[3:])
    assert not any(parameter.requires_grad for parameter in group.parameters())
    assert {name: len(value) for name, value in group.state_dict().items()} == {"user": 3, "item": 5}
    assert dtype in repr(group)


@pytest.mark.parametrize(
    ("dtype", "storage"), [("int8", torch.zeros(4, 23, dtype=torch.uint8)), ("int4", torch.zeros(4, 16)), ("fp16", torch.zeros(4, 16))]
)
def test_a_storage_of_another_shape_is_refused(dtype: TableDtype, storage: Tensor) -> None:
    with pytest.raises(SpecError, match=rf"tables in {dtype} of dim 16 are stored as"):
        QuantizedTable(dtype, 16, storage)


def test_unknown_type_names_the_nearest() -> None:
    assert check_dtype("int8") == "int8"
    with pytest.raises(SpecError, match="no table type 'int16'; did you mean 'int"):
        check_dtype("int16")


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \(rows, dim\) is needed"):
        quantize(torch.from_numpy(np.zeros((2, 2))), "int8")
