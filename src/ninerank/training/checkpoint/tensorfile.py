"""Safetensors files, written and hashed in one pass: no copy of the whole in memory, no second reading for the digest.

The layout is the published one: 8 bytes length of the header, little-endian; a JSON header of dtype, shape and offsets, padded with
spaces to a multiple of 8; the tensors' bytes, those of wider dtypes first, without gaps.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ninerank.errors import CheckpointError

__all__ = ["DTYPES", "TORCH_DTYPES", "Content", "opened", "read_tensor", "write_tensors"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {code: dtype for dtype, code in DTYPES.items()}
BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Content:
    """A tensor to be written: what it is, and how to get at it when its turn comes, on whatever device, contiguous or not."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, contents: Mapping[str, Content]) -> tuple[str, int]:
    """Write a new file and flush it to the disk; returns its SHA-256 in hex and its size. Raises TypeError for a dtype it cannot hold."""
    ordered = sorted(contents.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as stream:
        for block in chain([_header(ordered)], *(_blocks(content) for _, content in ordered)):
            digest.update(block)
            stream.write(block)
            size += len(block)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest(), size


def _header(ordered: list[tuple[str, Content]]) -> bytes:
    entries, first = {}, 0
    for key, content in ordered:
        if content.dtype not in DTYPES:
            raise TypeError(f"{key}: a checkpoint cannot hold {content.dtype}; it can hold {', '.join(map(str, DTYPES))}")
        last = first + content.num_bytes
        entries[key] = {"dtype": DTYPES[content.dtype], "shape": list(content.shape), "data_offsets": [first, last]}
        first = last
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(content: Content) -> "Iterator[bytes | memoryview[int]]":
    """The bytes of a tensor, some rows at a time: what lies on a device, or not in one piece, is never copied as a whole."""
    held = content.tensor().detach()
    assert (held.dtype, tuple(held.shape)) == (content.dtype, content.shape)
    if held.numel() == 0:
        return
    rows = held if held.dim() else held.reshape(1)
    step = max(1, BLOCK_BYTES * len(rows) // content.num_bytes)
    for first in range(0, len(rows), step):
        block = rows[first : first + step].cpu().contiguous()
        flat = block.as_strided((block.numel(),), (1,))  # a dimension of one row may have any stride, which `view` would refuse
        yield flat.view(torch.uint8).numpy().data


def read_tensor(path: Path, key: str) -> Tensor:
    """A whole tensor of a file; raises CheckpointError where it cannot be read."""
    with opened(path) as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def opened(path: Path) -> safe_open:
    """A file to read tensors and slices from; raises CheckpointError where it cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
