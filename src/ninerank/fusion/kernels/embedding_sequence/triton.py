"""Triton launch of the plain lookup: padding becomes rows that are not there, then the gather of `embedding_bag` runs."""

import torch
from torch import Tensor

from ninerank.fusion.kernels.embedding_bag.triton import gather_rows

__all__ = ["run"]

NO_ROW = -1


def run(weight_RD: Tensor, rows_N: Tensor, offsets: Tensor | None, max_length: int) -> Tensor:
    if offsets is None:
        return gather_rows(weight_RD, rows_N.contiguous())
    num_sequences = offsets.numel() - 1
    position_L = torch.arange(max_length, dtype=offsets.dtype, device=offsets.device)
    place_BL = offsets[:-1, None] + position_L
    is_there_BL = position_L < offsets.diff()[:, None]
    padded_BL = rows_N.new_full((num_sequences, max_length), NO_ROW)
    if rows_N.numel():
        padded_BL = torch.where(is_there_BL, rows_N[place_BL.clamp(max=rows_N.numel() - 1)], padded_BL)
    return gather_rows(weight_RD, padded_BL.view(-1)).view(num_sequences, max_length, weight_RD.shape[1])
