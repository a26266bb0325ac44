"""The part of a tensor that one process holds: where it lies in the whole."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shard", "absent"]


@dataclass(frozen=True)
class Shard:
    """A block of a tensor that several processes hold together.

    global_shape: of the whole tensor. offsets: where the block begins, one number a dimension. tensor: the block, a view of the
    storage that trains, so that writing to it changes the table. Blocks of different processes do not overlap; of a tensor that
    every process holds in full, the first process alone names it.

    >>> import torch
    >>> Shard((10, 4), (5, 0), torch.zeros(5, 4)).stop
    (10, 4)
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor

    def __post_init__(self) -> None:
        if not len(self.global_shape) == len(self.offsets) == self.tensor.dim():
            raise ValueError(
                f"shape {self.global_shape}, offsets {self.offsets} and a tensor of {self.tensor.dim()} dimensions do not go together"
            )
        for size, first, stop in zip(self.global_shape, self.offsets, self.stop, strict=True):
            if first < 0 or stop > size:
                raise ValueError(f"block {self.offsets} to {self.stop} does not lie within {self.global_shape}")

    @property
    def stop(self) -> tuple[int, ...]:
        """Where the block ends, exclusive, one number a dimension."""
        return tuple(first + size for first, size in zip(self.offsets, self.tensor.shape, strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether the block is the whole tensor."""
        return tuple(self.tensor.shape) == self.global_shape


def absent(shape: tuple[int, ...], dtype: torch.dtype) -> Shard:
    """The block of a process that holds nothing of a tensor.

    >>> absent((10, 4), torch.float32).tensor.numel()
    0
    """
    return Shard(shape, (shape[0], *(0 for _ in shape[1:])), torch.empty(0, *shape[1:], dtype=dtype))
