"""Lookup in a table whose rows are 8-bit or 4-bit codes, each row with a scale and a bias of its own.

    out[n, d] = bias_r + scale_r * code[r, d]        with r = rows_N[n], codes 0 ... 2^bits - 1

storage_VS: uint8 (V, S), row-major, a row of S = `row_bytes(dim, bits)` bytes, a multiple of 4:

    bytes 0-3   scale, float32 little-endian
    bytes 4-7   bias, float32 little-endian
    bytes 8-    codes: one a byte (8 bits); or, with H = ceil(dim / 2), byte 8 + i holds column i in its low half and column
                H + i in its high half (4 bits), so that both halves of a row are read and written in one piece
    zeros up to S

rows_N: int32 or int64. Returns float32 (N, D). A row that the storage does not have raises IndexError on CPU, and counts as a row of
zeros on CUDA and Ascend. Scale and bias are read as they are: what `ninerank.embedding.quantize` writes is finite.
No gradient: such tables are read alone. Deterministic: every output is written once; it may differ in the last bit between
machines that fuse the multiplication and the addition and those that do not.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: row-wise quantised tables as in Guan et al. 2019, arXiv:1911.02079.

N ids, V rows, D embedding dim, S bytes a row.
"""

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry

__all__ = ["BITS", "HEADER_BYTES", "quantized_rows", "reference", "row_bytes"]

BITS = (8, 4)
HEADER_BYTES = 8
ALIGNED_BYTES = 4


def row_bytes(dim: int, bits: int) -> int:
    """Bytes S of one row.

    >>> row_bytes(16, 8), row_bytes(16, 4), row_bytes(3, 4)
    (24, 16, 12)
    """
    return HEADER_BYTES + -(-code_bytes(dim, bits) // ALIGNED_BYTES) * ALIGNED_BYTES


def code_bytes(dim: int, bits: int) -> int:
    """Bytes of a row's codes."""
    return dim if bits == 8 else -(-dim // 2)


def quantized_rows(storage_VS: Tensor, rows_N: Tensor, dim: int, bits: int, *, kernel: str = registry.AUTO) -> Tensor:
    """Rows (N, D) as float32; see the module's contract.

    >>> header = torch.tensor([[0.5, -1.0]]).view(torch.uint8)
    >>> storage = torch.cat([header, torch.tensor([[0, 2, 4, 0]], dtype=torch.uint8)], dim=1)
    >>> quantized_rows(storage, torch.tensor([0]), 3, 8, kernel="torch")
    tensor([[-1.,  0.,  1.]])
    """
    out: Tensor = _operator(storage_VS, rows_N, dim, bits, kernel)
    return out


def reference(storage_VS: Tensor, rows_N: Tensor, dim: int, bits: int) -> Tensor:
    """The contract in plain torch operators."""
    row_NS = storage_VS.index_select(0, rows_N.to(torch.int64))
    header_N2 = row_NS[:, :HEADER_BYTES].contiguous().view(torch.float32)
    packed = row_NS[:, HEADER_BYTES : HEADER_BYTES + code_bytes(dim, bits)]
    code_ND = packed if bits == 8 else torch.cat([packed & 15, packed >> 4], dim=1)[:, :dim]
    return header_N2[:, 1:] + header_N2[:, :1] * code_ND.to(torch.float32)


@torch.library.custom_op("ninerank::quantized_rows", mutates_args=())
def _operator(storage_VS: Tensor, rows_N: Tensor, dim: int, bits: int, kernel: str = registry.AUTO) -> Tensor:
    if bits not in BITS or dim < 1:
        raise ValueError(f"codes of {bits} bits, dim {dim}; {' or '.join(map(str, BITS))} bits and a dim above 0 are needed")
    if storage_VS.dtype != torch.uint8 or storage_VS.shape[1:] != (row_bytes(dim, bits),) or not storage_VS.is_contiguous():
        raise ValueError(
            f"the storage is {storage_VS.dtype} {tuple(storage_VS.shape)}, strides {storage_VS.stride()}; "
            f"a contiguous torch.uint8 (rows, {row_bytes(dim, bits)}) is needed for dim {dim} in {bits} bits"
        )
    if rows_N.dim() != 1 or rows_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are {rows_N.dtype} of shape {tuple(rows_N.shape)}; one dimension of torch.int32 or torch.int64 is needed")
    run = registry.choose("quantized_rows", storage_VS.device.type, kernel)
    out: Tensor = run(storage_VS, rows_N, dim, bits)
    return out


@_operator.register_fake
def _fake(storage_VS: Tensor, rows_N: Tensor, dim: int, bits: int, kernel: str = registry.AUTO) -> Tensor:
    return storage_VS.new_empty((rows_N.shape[0], dim), dtype=torch.float32)


for _kernel in (
    registry.Kernel("quantized_rows", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("quantized_rows", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("quantized_rows", "torch", __name__, "reference"),
):
    registry.register(_kernel)
