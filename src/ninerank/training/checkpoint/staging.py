"""The snapshot that an asynchronous save writes: copies in host memory, made before training goes on."""

from torch import Tensor, empty, get_device_module
from torch.distributed.checkpoint.staging import AsyncStager

from ninerank.embedding.shard import Shard
from ninerank.training.checkpoint.tree import Leaf

__all__ = ["HostBuffers"]


class HostBuffers(AsyncStager):
    """Host memory of the size of what this process saves, allocated by the first save and used again by every later one.

    Tensors of a CUDA device are copied to pinned memory. Leaves that belong to the save already are not copied. One save at a time.
    """

    _synchronize_after_execute = False  # `stage` returns when the copies are made

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def stage(self, state_dict: dict[str, Leaf]) -> dict[str, Leaf]:
        """The same leaves with tensors that training cannot change."""
        before, self._buffers = self._buffers, {}
        staged = {name: leaf if leaf.is_own else self._copy(name, leaf, before) for name, leaf in state_dict.items()}
        for device in {shard.tensor.device for leaf in state_dict.values() for shard in leaf.shards}:
            if device.type != "cpu":
                get_device_module(device).synchronize(device)
        return staged

    def _copy(self, name: str, leaf: Leaf, before: dict[tuple[str, tuple[int, ...]], Tensor]) -> Leaf:
        copies = []
        for shard in leaf.shards:
            source, key = shard.tensor.detach(), (name, shard.offsets)
            buffer = before.pop(key, None)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = empty(source.shape, dtype=source.dtype, pin_memory=source.device.type == "cuda")
            self._buffers[key] = buffer.copy_(source, non_blocking=True)
            copies.append(Shard(shard.global_shape, shard.offsets, buffer))
        return Leaf(tuple(copies))

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def close(self) -> None:
        """Give the memory back."""
        self._buffers = {}
