"""Lookup without pooling: rows of a merged storage, flat or padded into sequences.

    flat    (offsets None):   out[n, :] = weight[row_n, :]                                       (N, D)
    padded  (offsets (B + 1)): out[b, i, :] = weight[row at offsets[b] + i, :], zero from the sequence's end on   (B, L, D)

weight_RD: float32, float16 or bfloat16 (R, D). rows_N: int32 or int64 rows of the storage. offsets: integer (B + 1,) start of
each sequence. max_length: L, at least the longest sequence (ValueError on CPU if not; CUDA and Ascend drop what is beyond L).
Returns float32 (float64 only for the reference on a float64 table). A row that the storage does not have raises IndexError on
CPU, and counts as a row of zeros on CUDA and Ascend.

Gradient: for the weight dense, each row summed once in the order of n; a table with a fused optimizer takes none.
Deterministic: every output is written once.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).

B sequences, L positions, N ids, R rows, D embedding dim.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_reduce import embedding_reduce

__all__ = ["embedding_sequence", "reference", "sequence_entries"]


def embedding_sequence(
    weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None = None, max_length: int = 0, *, kernel: str = registry.AUTO
) -> Tensor:
    """Embeddings (N, D), or (B, L, D) with offsets; see the module's contract.

    >>> weight = torch.arange(4.0).view(4, 1)
    >>> embedding_sequence(weight, torch.tensor([3, 1, 2]), torch.tensor([0, 1, 3]), 2, kernel="torch").squeeze(-1)
    tensor([[3., 0.],
            [1., 2.]])
    """
    run = _look_up if registry.is_plain(weight_RD) else _operator
    out: Tensor = run(weight_RD, rows_N, offsets, max_length, kernel)
    return out


def sequence_entries(offsets: Tensor, max_length: int, num_ids: int, *, kernel: str = registry.AUTO) -> Tensor:
    """Output row b * L + i (int32 (N,)) of every id: what `embedding_reduce` and `embedding_update` take as grad_row_N.

    >>> sequence_entries(torch.tensor([0, 1, 3]), 2, 3)
    tensor([0, 2, 3], dtype=torch.int32)
    """
    run = registry.choose("sequence_entries", offsets.device.type, kernel)
    entries_N: Tensor = run(offsets, max_length, num_ids)
    return entries_N


def entries_reference(offsets: Tensor, max_length: int, num_ids: int) -> Tensor:
    """`sequence_entries` in plain torch operators."""
    lengths_B = offsets.diff()
    # Shift of each sequence between the flat and the padded layout.
    shift_B = torch.arange(lengths_B.numel(), device=offsets.device) * max_length - offsets[:-1]
    shift_N = torch.repeat_interleave(shift_B, lengths_B, output_size=num_ids)
    return (shift_N + torch.arange(num_ids, device=offsets.device)).to(torch.int32)


def reference(weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, max_length: int) -> Tensor:
    """The contract in plain torch operators."""
    dtype = torch.float64 if weight_RD.dtype == torch.float64 else torch.float32
    values_ND = torch.nn.functional.embedding(rows_N, weight_RD).to(dtype)
    if offsets is None:
        return values_ND
    if offsets.device.type == "cpu":
        check_lengths(offsets, max_length)
    num_sequences, dim = offsets.numel() - 1, weight_RD.shape[1]
    out = values_ND.new_zeros(num_sequences * max_length, dim)
    out[entries_reference(offsets, max_length, rows_N.numel()).to(torch.int64)] = values_ND
    return out.view(num_sequences, max_length, dim)


def check_lengths(offsets: Tensor, max_length: int) -> None:
    """Raise ValueError where a sequence is longer than max_length."""
    if offsets.numel() > 1 and int(offsets.diff().max()) > max_length:
        raise ValueError(f"a sequence has {int(offsets.diff().max())} ids, more than max_length {max_length}")


def _look_up(weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, max_length: int, kernel: str = registry.AUTO) -> Tensor:
    if weight_RD.dim() != 2 or not weight_RD.is_contiguous():
        raise ValueError(
            f"the storage has shape {tuple(weight_RD.shape)}, strides {weight_RD.stride()}; a contiguous (rows, dim) is needed"
        )
    if rows_N.dim() != 1 or rows_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are {rows_N.dtype} of shape {tuple(rows_N.shape)}; one dimension of torch.int32 or torch.int64 is needed")
    run = registry.choose("embedding_sequence", weight_RD.device.type, kernel)
    out: Tensor = run(weight_RD, rows_N, offsets, max_length)
    return out


_operator = torch.library.custom_op("ninerank::embedding_sequence", _look_up, mutates_args=())


@_operator.register_fake
def _fake(weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, max_length: int, kernel: str = registry.AUTO) -> Tensor:
    dtype = torch.float64 if weight_RD.dtype == torch.float64 else torch.float32
    lead = (rows_N.shape[0],) if offsets is None else (offsets.shape[0] - 1, max_length)
    return weight_RD.new_empty((*lead, weight_RD.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight_RD, rows_N, offsets, ctx.max_length, ctx.kernel = inputs
    ctx.table_shape, ctx.table_dtype = weight_RD.shape, weight_RD.dtype
    ctx.save_for_backward(rows_N, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows_N, offsets = ctx.saved_tensors
    # In plain operators, so that it can be traced.
    entries_N = None if offsets is None else entries_reference(offsets, ctx.max_length, rows_N.numel())
    unique_U, sums_UD = embedding_reduce(grad.reshape(-1, grad.shape[-1]), rows_N, entries_N, None, ctx.table_shape[0], kernel=ctx.kernel)
    weight_grad = torch.zeros(ctx.table_shape, dtype=ctx.table_dtype, device=grad.device)
    weight_grad.index_copy_(0, unique_U.to(torch.int64), sums_UD.to(ctx.table_dtype))
    return weight_grad, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("embedding_sequence", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("embedding_sequence", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("embedding_sequence", "torch", __name__, "reference"),
    registry.Kernel("sequence_entries", "numba", f"{__name__}.cpu", "entries", ("cpu",), "numba"),
    registry.Kernel("sequence_entries", "torch", __name__, "entries_reference"),
):
    registry.register(_kernel)
