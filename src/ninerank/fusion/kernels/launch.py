"""Sizes of a Triton launch that CUDA and Ascend both take.

The grid has one dimension and no more programs than the device runs at once; each program loops over blocks. (Ascend
refuses more than 65,535 programs and prefers about one a vector core.) A block is a tile of rows by embedding columns
that fits Ascend's unified buffer several times over: 8 KiB of float32 a tile, where 192 KiB hold all live tiles.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

__all__ = ["Tile", "is_wide", "num_programs", "on_device"]

TILE_ELEMENTS = 2048
MAX_TILE_ROWS = 128
PROGRAMS_PER_SM = 16
ASCEND_VECTOR_CORES = 40
BLOCK_BYTES = 32  # what Ascend moves at least
MAX_INT32_ELEMENTS = 2**31


@dataclass(frozen=True)
class Tile:
    """Tile of `rows` x `columns`, at least the embedding dim.

    Triton takes powers of two; triton-ascend any number, and it refuses to mask columns of rows that it scatters. Rows that it gathers it
    moves by one copy each if they fill whole blocks of 32 bytes, and number by number if not.

    >>> Tile.of(10, "cuda"), Tile.of(10, "npu"), Tile.of(10, "npu", gathered_bytes=2)
    (Tile(rows=128, columns=16), Tile(rows=128, columns=10), Tile(rows=128, columns=16))
    >>> Tile.of(512, "cuda")
    Tile(rows=4, columns=512)
    """

    rows: int
    columns: int

    @staticmethod
    def of(dim: int, device_type: str, *, many: bool = False, gathered_bytes: int = 0) -> "Tile":
        """Tile for an embedding dim, on Ascend half of it for a kernel that keeps `many` live at once; ValueError above 2,048.

        gathered_bytes: of a number, in a kernel that gathers rows and scatters none. On Ascend its tiles have columns for whole blocks, of
        which it masks those that are not the row's. What it reads there is up to 31 bytes behind the row: the next row, or behind the
        last one what torch_npu's allocator leaves free behind every tensor, 32 bytes.
        """
        if not 1 <= dim <= TILE_ELEMENTS:
            raise ValueError(f"embedding dim {dim} is not between 1 and {TILE_ELEMENTS}, what Triton kernels take")
        power = 1 << (dim - 1).bit_length()
        elements = TILE_ELEMENTS // 2 if many and device_type == "npu" else TILE_ELEMENTS
        columns = dim if device_type == "npu" else power
        if device_type == "npu" and gathered_bytes and dim > 1:
            columns = -(-dim * gathered_bytes // BLOCK_BYTES) * BLOCK_BYTES // gathered_bytes
        return Tile(max(1, min(MAX_TILE_ROWS, elements // max(power, columns))), columns)


def num_programs(num_rows: int, tile: Tile, device: torch.device) -> int:
    """Programs for `num_rows` rows of output: one a tile, up to what the device runs at once."""
    tiles = max(1, -(-num_rows // tile.rows))
    if device.type == "cuda":
        return min(tiles, PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count)
    return min(tiles, ASCEND_VECTOR_CORES)


def is_wide(num_rows: int, dim: int) -> bool:
    """Whether a storage has elements that int32 cannot count: addresses then take int64, which Ascend does slowly."""
    return num_rows * dim >= MAX_INT32_ELEMENTS


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one while kernels are launched."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)
