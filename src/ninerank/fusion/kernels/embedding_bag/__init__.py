"""Pooled lookup: rows of a merged storage, summed or averaged by bag.

    out[b, f, :] = scale * sum over n in bag (f, b) of w_n * weight[row_n, :]

w_n: `sample_weight_N[n]`, 1 without. scale: 1 / (ids in the bag) for features with `mean_F[f]`, else 1. An empty bag is zero.

weight_RD: float32, float16 or bfloat16 (R, D), row-major. rows_N: int32 or int64 rows of the storage (`embedding_rows` makes
them), feature by feature. offsets: integer (F * B + 1,) start of each (feature, bag), or None where every bag holds one id
(N = F * B). sample_weight_N: float32. mean_F: bool. Returns (B, F, D), or (F, B, D) if `feature_major`; float32, with sums
kept in float32 whatever the table's type (float64 only for the reference on a float64 table).
A row that the storage does not have raises IndexError on CPU, and counts as a row of zeros on CUDA and Ascend.

Gradient: for the weight dense, each row summed once in the order of n; for the sample weights exact. A table that learns
by a fused optimizer takes no gradient: see `ninerank.fusion.lookup`.
Deterministic: a bag is summed in the order of n by one thread, so the result does not depend on their number.
Kernels: numba (cpu), triton (cuda, npu), torch (everywhere; the reference).
Prior work: fused table-batched lookup as in FBGEMM (Khudia et al. 2021, arXiv:2101.05615).

F features, B bags a feature, N ids, R rows, D embedding dim, O = B * F bags in all.
"""

from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_bag.entries import reference as entries_reference
from ninerank.fusion.kernels.embedding_reduce import embedding_reduce

__all__ = ["TABLE_DTYPES", "check", "embedding_bag", "empty_output", "reference"]

TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def embedding_bag(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    num_features: int,
    *,
    sample_weight_N: Tensor | None = None,
    mean_F: Tensor | None = None,
    feature_major: bool = False,
    kernel: str = registry.AUTO,
) -> Tensor:
    """Pooled embeddings (B, F, D); see the module's contract.

    >>> weight = torch.arange(8.0).view(4, 2)
    >>> rows, offsets = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 2, 2, 3])
    >>> embedding_bag(weight, rows, offsets, 2, kernel="torch")
    tensor([[[2., 4.],
             [0., 0.]],
            [[0., 0.],
             [6., 7.]]])
    """
    run = _pool if registry.is_plain(weight_RD, sample_weight_N) else _operator
    out: Tensor = run(weight_RD, rows_N, offsets, sample_weight_N, mean_F, num_features, feature_major, kernel)
    return out


def reference(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
) -> Tensor:
    """The contract in plain torch operators."""
    dtype = torch.float64 if weight_RD.dtype == torch.float64 else torch.float32
    bags_O, scale_N = entries_reference(rows_N.numel(), offsets, sample_weight_N, mean_F, num_features, feature_major, rows_N.device)
    values_ND = torch.nn.functional.embedding(rows_N, weight_RD).to(dtype)
    if scale_N is not None:
        values_ND = values_ND * scale_N.to(dtype)[:, None]
    num_bags = num_bags_of(rows_N, offsets, num_features)
    out = values_ND.new_zeros(num_features * num_bags, weight_RD.shape[1])
    out.index_add_(0, bags_O.to(torch.int64), values_ND)
    return out.view(_shape(num_bags, num_features, weight_RD.shape[1], feature_major))


def num_bags_of(rows_N: Tensor, offsets: Tensor | None, num_features: int) -> int:
    """Bags B that each feature has."""
    return (rows_N.shape[0] if offsets is None else offsets.shape[0] - 1) // num_features


def _shape(num_bags: int, num_features: int, dim: int, feature_major: bool) -> tuple[int, int, int]:
    return (num_features, num_bags, dim) if feature_major else (num_bags, num_features, dim)


def _pool(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
    kernel: str = registry.AUTO,
) -> Tensor:
    check(weight_RD, rows_N, offsets, sample_weight_N, mean_F, num_features)
    run = registry.choose("embedding_bag", weight_RD.device.type, kernel)
    out: Tensor = run(weight_RD, rows_N, offsets, sample_weight_N, mean_F, num_features, feature_major)
    return out


_operator = torch.library.custom_op("ninerank::embedding_bag", _pool, mutates_args=())


@_operator.register_fake
def _fake(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
    kernel: str = registry.AUTO,
) -> Tensor:
    return empty_output(weight_RD, rows_N, offsets, num_features, feature_major)


def empty_output(weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, num_features: int, feature_major: bool) -> Tensor:
    """What a lookup returns, not filled."""
    dtype = torch.float64 if weight_RD.dtype == torch.float64 else torch.float32
    shape = _shape(num_bags_of(rows_N, offsets, num_features), num_features, weight_RD.shape[1], feature_major)
    return weight_RD.new_empty(shape, dtype=dtype)


def check(
    weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, sample_weight_N: Tensor | None, mean_F: Tensor | None, num_features: int
) -> None:
    """Raise ValueError for arguments that do not fit together."""
    if weight_RD.dim() != 2 or not weight_RD.is_contiguous():
        raise ValueError(
            f"the storage has shape {tuple(weight_RD.shape)}, strides {weight_RD.stride()}; a contiguous (rows, dim) is needed"
        )
    if rows_N.dim() != 1 or rows_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are {rows_N.dtype} of shape {tuple(rows_N.shape)}; one dimension of torch.int32 or torch.int64 is needed")
    bags = rows_N.numel() if offsets is None else offsets.numel() - 1
    if num_features < 1 or bags < 0 or bags % num_features:
        raise ValueError(f"{bags} bags do not share out over {num_features} features")
    if sample_weight_N is not None and sample_weight_N.shape != rows_N.shape:
        raise ValueError(f"there are {sample_weight_N.numel()} sample weights for {rows_N.numel()} ids")
    if mean_F is not None and mean_F.numel() != num_features:
        raise ValueError(f"mean_F holds {mean_F.numel()} features of {num_features}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight_RD, rows_N, offsets, sample_weight_N, mean_F, ctx.num_features, ctx.feature_major, ctx.kernel = inputs
    ctx.table_shape, ctx.table_dtype = weight_RD.shape, weight_RD.dtype
    ctx.save_for_backward(weight_RD if sample_weight_N is not None else None, rows_N, offsets, sample_weight_N, mean_F)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Plain operators and no kernel's own arrays, so that it can be traced.
    weight_RD, rows_N, offsets, sample_weight_N, mean_F = ctx.saved_tensors
    grad_OD = grad.reshape(-1, grad.shape[-1])
    layout = (ctx.num_features, ctx.feature_major, grad.device)
    weight_grad = sample_grad = None
    if ctx.needs_input_grad[0]:
        bags_N, scale_N = entries_reference(rows_N.numel(), offsets, sample_weight_N, mean_F, *layout)
        unique_U, sums_UD = embedding_reduce(grad_OD, rows_N, bags_N, scale_N, ctx.table_shape[0], kernel=ctx.kernel)
        weight_grad = torch.zeros(ctx.table_shape, dtype=ctx.table_dtype, device=grad.device)
        weight_grad.index_copy_(0, unique_U.to(torch.int64), sums_UD.to(ctx.table_dtype))
    if ctx.needs_input_grad[3]:
        bags_N, scale_N = entries_reference(rows_N.numel(), offsets, None, mean_F, *layout)
        sample_grad = (weight_RD[rows_N.to(torch.int64)].to(grad.dtype) * grad_OD[bags_N.to(torch.int64)]).sum(-1)
        sample_grad = sample_grad if scale_N is None else sample_grad * scale_N
    return weight_grad, None, None, sample_grad, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)

for _kernel in (
    registry.Kernel("embedding_bag", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("embedding_bag", "triton", f"{__name__}.triton", "run", ("cuda", "npu"), "triton"),
    registry.Kernel("embedding_bag", "torch", __name__, "reference"),
):
    registry.register(_kernel)
