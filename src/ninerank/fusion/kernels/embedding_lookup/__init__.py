"""Ids to pooled embeddings in one call: `embedding_rows`, then `embedding_bag` of the rows, with both results.

    row_n        = the row of id n, by the rules of `embedding_rows`
    out[b, f, :] = the pooled rows of bag (f, b), by the rules of `embedding_bag`

Where every bag holds one id, ids are checked and looked up share by share while they are in a core's cache, and a call costs one
dispatch. The rows are what a backward pass needs: `embedding_update` takes them.

weight_RD, sample_weight_N, mean_F, feature_major, the output and determinism: as in `embedding_bag`. values_N, offsets, first_row_F,
num_rows_F, policy_F and the rows: as in `embedding_rows`; raises IdRangeError, and ValueError where a feature's table is not in the
storage. Ids are on the host. The storage takes no gradient here: see `ninerank.fusion.lookup.looked_up`.
Kernels: numba (cpu), torch (everywhere; the reference).

F features, B bags a feature, N ids, R rows, D embedding dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ninerank.fusion.kernels import embedding_bag as bag
from ninerank.fusion.kernels import embedding_rows as rows
from ninerank.fusion.kernels import registry

__all__ = ["embedding_lookup", "reference"]


def embedding_lookup(
    weight_RD: Tensor,
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    *,
    policy_F: Tensor | None = None,
    sample_weight_N: Tensor | None = None,
    mean_F: Tensor | None = None,
    feature_major: bool = False,
    names: Sequence[str] | None = None,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor]:
    """Pooled embeddings (B, F, D) and rows (N,); see the module's contract. `names` of the F features make errors readable.

    >>> weight, first, size = torch.arange(10.0).view(5, 2), torch.tensor([0, 3]), torch.tensor([3, 2])
    >>> out, rows = embedding_lookup(weight, torch.tensor([0, 2, 1, 1]), None, first, size, kernel="torch")
    >>> out[1], rows
    (tensor([[4., 5.],
            [8., 9.]]), tensor([0, 2, 4, 4], dtype=torch.int32))
    """
    run = _look_up if registry.is_plain(weight_RD, sample_weight_N) else _operator
    with rows.naming(names):
        out, rows_N = run(weight_RD, values_N, offsets, first_row_F, num_rows_F, policy_F, sample_weight_N, mean_F, feature_major, kernel)
    return out, rows_N


def reference(
    weight_RD: Tensor,
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    policy_F: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    feature_major: bool,
) -> tuple[Tensor, Tensor]:
    """The contract in plain torch operators."""
    rows_N = rows.reference(values_N, offsets, first_row_F, num_rows_F, policy_F, weight_RD.shape[0])
    return bag.reference(weight_RD, rows_N, offsets, sample_weight_N, mean_F, first_row_F.numel(), feature_major), rows_N


def _look_up(
    weight_RD: Tensor,
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    policy_F: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    feature_major: bool,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor]:
    rows.check(values_N, offsets, first_row_F, num_rows_F, policy_F)
    bag.check(weight_RD, values_N, offsets, sample_weight_N, mean_F, first_row_F.numel())
    lowest, end = int(first_row_F.min()), int((first_row_F + num_rows_F).max())
    if lowest < 0 or end > weight_RD.shape[0]:
        raise ValueError(f"tables take the rows {lowest} to {end - 1}; the storage has {weight_RD.shape[0]}")
    run = registry.choose("embedding_lookup", weight_RD.device.type, kernel)
    out, rows_N = run(weight_RD, values_N, offsets, first_row_F, num_rows_F, policy_F, sample_weight_N, mean_F, feature_major)
    return out, rows_N


_operator = torch.library.custom_op("ninerank::embedding_lookup", _look_up, mutates_args=())


@_operator.register_fake
def _fake(
    weight_RD: Tensor,
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    policy_F: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    feature_major: bool,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor]:
    rows_N = torch.empty_like(values_N, dtype=rows.row_dtype(weight_RD.shape[0]))
    return bag.empty_output(weight_RD, values_N, offsets, first_row_F.numel(), feature_major), rows_N


for _kernel in (
    registry.Kernel("embedding_lookup", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("embedding_lookup", "torch", __name__, "reference"),
):
    registry.register(_kernel)
