"""Tables for serving in 16, 8 or 4 bits a number, written block by block and looked up without restoring the whole table.

    fp32    float32, as trained
    fp16    float16, rounded to nearest even
    int8    row-wise: w' = bias + scale * code, code in 0 ... 255, bias the row's least value, scale = (greatest - least) / 255
    int4    the same with codes in 0 ... 15, two a byte

Scale and bias are float32, 8 bytes a row. Float16 would save 4 of them, but has no normal numbers below 6e-5: the scale of a row that spans
less than 0.016 in 8 bits would lose digits, which is where rows of seldom seen ids lie after a start from N(0, 0.01^2). And a float32
bias gives rows of one value (padding, ids never seen) back exactly.

Error of a row with values between `low` and `high`, m = max(|low|, |high|), L = 2^bits - 1:

    int8, int4    |w - w'| <= (high - low) / (2 L) + 2^-22 m      half a step, then the rounding of scale, product and sum in float32
    fp16          |w - w'| <= max(2^-11 m, 2^-25)                 for m <= 65504; beyond, the row is refused

Shape legend: V rows, D embedding dim, S what a row is stored in (bytes, or D float16 numbers), N looked-up rows.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ninerank.embedding.table import TableGroup, TableLayout
from ninerank.errors import DataError, SpecError, nearest
from ninerank.fusion.kernels.embedding_sequence import embedding_sequence
from ninerank.fusion.kernels.quantized_rows import HEADER_BYTES, code_bytes, quantized_rows, row_bytes

__all__ = ["QuantizedGroup", "QuantizedTable", "TableDtype", "check_dtype", "error_bound", "quantize", "quantize_group", "stored_dtype"]

TableDtype = Literal["fp32", "fp16", "int8", "int4"]
CODE_BITS = {"int8": 8, "int4": 4}
FLOATS = {"fp32": torch.float32, "fp16": torch.float16}
BLOCK_NUMBERS = 1 << 20
LARGEST_FLOAT16 = 65504.0
LARGEST_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class QuantizedTable:
    """Rows of one or more tables as they are stored. storage_VS: float32 or float16 (V, D), or uint8 as `quantized_rows` takes it."""

    dtype: TableDtype
    dim: int
    storage_VS: Tensor

    def __post_init__(self) -> None:
        wanted = (torch.uint8, row_bytes(self.dim, CODE_BITS[self.dtype])) if self.dtype in CODE_BITS else (FLOATS[self.dtype], self.dim)
        if self.storage_VS.dim() != 2 or (self.storage_VS.dtype, self.storage_VS.shape[1]) != wanted:
            held = f"{self.storage_VS.dtype} {tuple(self.storage_VS.shape)}"
            raise SpecError(f"tables in {self.dtype} of dim {self.dim} are stored as {wanted[0]} (rows, {wanted[1]}), these are {held}")

    @property
    def num_rows(self) -> int:
        return self.storage_VS.shape[0]

    def rows(self, row_N: Tensor) -> Tensor:
        """Rows (N, D) as float32; IndexError on the CPU for one that is not there."""
        if self.dtype in CODE_BITS:
            return quantized_rows(self.storage_VS, row_N, self.dim, CODE_BITS[self.dtype])
        return embedding_sequence(self.storage_VS, row_N)

    def dequantized(self) -> Tensor:
        """The whole table (V, D) as float32."""
        return self.rows(torch.arange(self.num_rows, device=self.storage_VS.device))


class QuantizedGroup(TableGroup):
    """All tables at one embedding dim in a storage that is only read."""

    def __init__(self, name: str, layout: TableLayout, table: QuantizedTable) -> None:
        super().__init__(name, layout, table.storage_VS, sparse=True)  # its storage takes no gradient
        self.sparse = False
        self.dim = table.dim
        self.dtype: TableDtype = table.dtype

    def rows(self, row_N: Tensor) -> Tensor:
        return QuantizedTable(self.dtype, self.dim, self.storage.detach()).rows(row_N)

    def table(self, name: str) -> Tensor:
        """One table (num_rows, D), restored."""
        return QuantizedTable(self.dtype, self.dim, self.storage.detach()[self.layout.rows_of(name)]).dequantized()

    def extra_repr(self) -> str:
        return f"{self.name}: {len(self.layout.names)} tables, {self.layout.total_rows} rows x {self.dim}, {self.dtype}, read alone"


def check_dtype(name: str) -> TableDtype:
    """`name` as a table type; raises SpecError with the nearest one otherwise."""
    for dtype in get_args(TableDtype):
        if name == dtype:
            return dtype  # type: ignore[no-any-return]
    raise SpecError(f"no table type {name!r}; {nearest(name, get_args(TableDtype))}")


def stored_dtype(dtype: TableDtype, dim: int) -> TableDtype:
    """What rows of `dim` are stored in where `dtype` is asked for: fp16 where scale and bias would make rows of codes no smaller.

    >>> stored_dtype("int8", 16), stored_dtype("int8", 8), stored_dtype("int4", 1), stored_dtype("fp32", 1)
    ('int8', 'fp16', 'fp16', 'fp32')
    """
    return "fp16" if dtype in CODE_BITS and row_bytes(dim, CODE_BITS[dtype]) >= 2 * dim else dtype


def quantize(table_VD: Tensor, dtype: TableDtype, *, name: str = "table", out: Tensor | None = None) -> QuantizedTable:
    """A float32 table in `dtype`, block by block; into `out` where given, and `table_VD` itself in fp32 where not.

    Raises DataError, naming `name`, the row and its value, for NaN and infinity and for what the type cannot hold.

    >>> table = quantize(torch.tensor([[0.0, 1.25, 3.0], [7.0, 7.0, 7.0]]), "int4")
    >>> table.dequantized()
    tensor([[0.0000, 1.2000, 3.0000],
            [7.0000, 7.0000, 7.0000]])
    """
    if table_VD.dim() != 2 or table_VD.dtype != torch.float32:
        raise ValueError(f"{name} is {table_VD.dtype} {tuple(table_VD.shape)}; torch.float32 (rows, dim) is needed")
    num_rows, dim = table_VD.shape
    if out is None:
        out = table_VD.detach() if dtype == "fp32" else _empty(num_rows, dim, dtype)
    table = QuantizedTable(dtype, dim, out)
    step = max(1, BLOCK_NUMBERS // dim)
    for first in range(0, num_rows, step):
        block_VD = table_VD[first : first + step].detach().cpu()
        _check(block_VD, dtype, name, first)
        if dtype in CODE_BITS:
            _write_codes(block_VD, CODE_BITS[dtype], out[first : first + step])
        elif out.data_ptr() != table_VD.data_ptr():
            out[first : first + step] = block_VD
    return table


def quantize_group(storage_VD: Tensor, layout: TableLayout, dtype: TableDtype, *, name: str) -> QuantizedTable:
    """The merged tables of group `name` in `stored_dtype(dtype, D)`; raises DataError, naming the table and its row, as `quantize` does."""
    num_rows, dim = storage_VD.shape
    stored = stored_dtype(dtype, dim)
    out = storage_VD.detach() if stored == "fp32" else _empty(num_rows, dim, stored)
    for table, rows in layout.items():
        quantize(storage_VD[rows], stored, name=f"group {name!r}, table {table!r}", out=out[rows])
    return QuantizedTable(stored, dim, out)


def _empty(num_rows: int, dim: int, dtype: TableDtype) -> Tensor:
    return torch.empty(num_rows, row_bytes(dim, CODE_BITS[dtype]) if dtype in CODE_BITS else dim, dtype=FLOATS.get(dtype, torch.uint8))


def error_bound(low: Tensor, high: Tensor, dtype: TableDtype) -> Tensor:
    """Greatest |w - w'| of rows with values between `low` and `high`, elementwise, float64; see the module's table."""
    low, high = low.double(), high.double()
    greatest: Tensor = torch.maximum(low.abs(), high.abs())
    if dtype == "fp32":
        return torch.zeros_like(greatest)
    if dtype == "fp16":
        return (greatest * 2.0**-11).clamp(min=2.0**-25)
    # 2^-140: steps so small that float32 cannot tell them apart any more.
    return (high - low) / (2 * _levels(CODE_BITS[dtype])) + greatest * 2.0**-22 + 2.0**-140


def _levels(bits: int) -> int:
    return (1 << bits) - 1


def _check(block_VD: Tensor, dtype: TableDtype, name: str, first: int) -> None:
    wrong_VD, why = ~block_VD.isfinite(), "tables hold finite numbers"
    if dtype == "fp16" and not bool(wrong_VD.any()):
        wrong_VD, why = block_VD.abs() > LARGEST_FLOAT16, f"fp16 holds numbers up to {LARGEST_FLOAT16:g}"
    elif dtype in CODE_BITS and not bool(wrong_VD.any()):
        wrong_VD, why = block_VD.abs() > LARGEST_FLOAT32 / 2, f"{dtype} holds numbers up to {LARGEST_FLOAT32 / 2:g}"
    if bool(wrong_VD.any()):
        row, column = wrong_VD.nonzero()[0].tolist()
        raise DataError(f"{name}: row {first + row}, column {column} is {block_VD[row, column]:g}; {why}")


def _write_codes(block_VD: Tensor, bits: int, out_VS: Tensor) -> None:
    """Codes of one block, computed in float64 against the scale as it is stored."""
    dim = block_VD.shape[1]
    exact_VD = block_VD.double()
    low_V1, high_V1 = exact_VD.amin(1, keepdim=True), exact_VD.amax(1, keepdim=True)
    scale_V1 = ((high_V1 - low_V1) / _levels(bits)).float()
    steps_VD = (exact_VD - low_V1) / torch.where(scale_V1 > 0, scale_V1.double(), 1.0)
    codes_VD = steps_VD.round_().clamp_(0, _levels(bits)).to(torch.uint8)
    if bits == 4:
        half = code_bytes(dim, bits)
        packed = codes_VD[:, :half].clone()
        packed[:, : dim - half] |= codes_VD[:, half:] << 4
        codes_VD = packed
    out_VS[:, :HEADER_BYTES] = torch.cat([scale_V1, low_V1.float()], dim=1).view(torch.uint8)
    out_VS[:, HEADER_BYTES : HEADER_BYTES + codes_VD.shape[1]] = codes_VD
    out_VS[:, HEADER_BYTES + codes_VD.shape[1] :] = 0
