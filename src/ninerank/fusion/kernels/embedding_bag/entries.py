"""For each id of a pooled lookup: which bag of the output it went into, and with what scale.

The gradient of a row is the scaled sum of these bags' gradients: what `embedding_reduce` and `embedding_update` take.
F features, B bags a feature, N ids, O = B * F bags in the order of the output.
"""

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry

__all__ = ["bag_entries", "reference"]


def bag_entries(
    num_ids: int,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
    device: torch.device,
    *,
    kernel: str = registry.AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Bag in [0, O) (int32 (N,)) and scale (float32 (N,), None where it is 1 throughout) of every id.

    >>> bag_entries(4, None, None, None, 2, False, torch.device("cpu"))
    (tensor([0, 2, 1, 3], dtype=torch.int32), None)
    """
    run = registry.choose("bag_entries", device.type, kernel)
    bag_N: Tensor
    scale_N: Tensor | None
    bag_N, scale_N = run(num_ids, offsets, sample_weight_N, mean_F, num_features, feature_major, device)
    return bag_N, scale_N


def reference(
    num_ids: int,
    offsets: Tensor | None,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    num_features: int,
    feature_major: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """The same in plain torch operators."""
    num_outputs = num_ids if offsets is None else offsets.numel() - 1
    bag_O = torch.arange(num_outputs, dtype=torch.int32, device=device)
    if not feature_major:
        bag_O = bag_O.view(num_outputs // num_features, num_features).t().reshape(-1)
    if offsets is None:
        return bag_O, sample_weight_N
    lengths_O = offsets.diff()
    bag_N = torch.repeat_interleave(bag_O, lengths_O, output_size=num_ids)
    if mean_F is None:
        return bag_N, sample_weight_N
    share_O = torch.where(mean_F[:, None], lengths_O.view(num_features, -1).clamp(min=1).to(torch.float32).reciprocal(), 1.0)
    scale_N = torch.repeat_interleave(share_O.view(-1), lengths_O, output_size=num_ids)
    return bag_N, scale_N if sample_weight_N is None else scale_N * sample_weight_N


for _kernel in (
    registry.Kernel("bag_entries", "numba", "ninerank.fusion.kernels.embedding_bag.cpu_entries", "run", ("cpu",), "numba"),
    registry.Kernel("bag_entries", "torch", __name__, "reference"),
):
    registry.register(_kernel)
