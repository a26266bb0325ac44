"""Numba kernel of `bag_entries`: one pass on one thread, without waking the threads that torch would."""

import numpy as np
import torch
from torch import Tensor

from ninerank.fusion.kernels.jit import as_numpy, jit

__all__ = ["run"]


def run(
    num_ids: int,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    bag_N = torch.empty(num_ids, dtype=torch.int32)
    if offsets is None:
        _single(as_numpy(bag_N), num_features, feature_major)
        return bag_N, sample_weight_N
    scale_N = None
    if mean_F is not None:
        scale_N = torch.ones(num_ids) if sample_weight_N is None else sample_weight_N.to(torch.float32).clone()
    start = as_numpy(offsets.contiguous())
    if start[-1] != num_ids:
        raise ValueError(f"offsets end at {start[-1]}, there are {num_ids} ids")
    scale, mean = (None, None) if scale_N is None or mean_F is None else (as_numpy(scale_N), as_numpy(mean_F.contiguous()))
    _jagged(as_numpy(bag_N), scale, start, mean, num_features, feature_major)
    return bag_N, sample_weight_N if scale_N is None else scale_N


@jit
def _single(bag_of, num_features, feature_major):
    num_bags = bag_of.size // num_features
    for feature in range(num_features):
        for bag in range(num_bags):
            n = feature * num_bags + bag
            bag_of[n] = n if feature_major else bag * num_features + feature


@jit
def _jagged(bag_of, scale, offsets, mean, num_features, feature_major):
    num_bags = (offsets.size - 1) // num_features
    for feature in range(num_features):
        for bag in range(num_bags):
            place = feature * num_bags + bag
            begin, end = max(np.int64(offsets[place]), 0), min(np.int64(offsets[place + 1]), bag_of.size)
            for n in range(begin, end):
                bag_of[n] = place if feature_major else bag * num_features + feature
            if mean is not None and scale is not None and mean[feature]:
                for n in range(begin, end):
                    scale[n] /= np.float32(end - begin)
