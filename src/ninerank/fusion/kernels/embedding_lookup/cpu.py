"""Numba kernel: one pass where every bag holds one id; of bags of any length, rows first and then the bags."""

import torch
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.cpu import run as pool
from ninerank.fusion.kernels.embedding_bag.cpu_single import look_up
from ninerank.fusion.kernels.embedding_rows import row_dtype
from ninerank.fusion.kernels.embedding_rows.cpu import VALID, id_arrays, raise_refused
from ninerank.fusion.kernels.embedding_rows.cpu import run as rows_of

__all__ = ["run"]


def run(
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
    num_rows, num_features = weight_RD.shape[0], first_row_F.numel()
    if offsets is not None:
        rows_N = rows_of(values_N, offsets, first_row_F, num_rows_F, policy_F, num_rows)
        return pool(weight_RD, rows_N, offsets, sample_weight_N, mean_F, num_features, feature_major), rows_N
    rows_N = torch.empty(values_N.shape, dtype=row_dtype(num_rows))
    ids = id_arrays(values_N, first_row_F, num_rows_F, policy_F)
    out, wrong = look_up(weight_RD, rows_N, sample_weight_N, num_features, feature_major, ids)
    if wrong != VALID:
        raise_refused(wrong, ids[0], None, ids[2])
    return out, rows_N
