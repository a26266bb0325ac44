"""Every Triton kernel in the forms in which the operators launch it, for compilers to be tried on without a device.

Imported by path: by test_triton.py, which compiles for CUDA, and by ascend_lower.py, which runs where triton-ascend is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ninerank.fusion.kernels.embedding_bag.triton import gather_kernel, pool_kernel
from ninerank.fusion.kernels.embedding_update.triton import update_kernel
from ninerank.fusion.kernels.launch import Tile
from ninerank.fusion.kernels.quantized_rows import code_bytes, row_bytes
from ninerank.fusion.kernels.quantized_rows.triton import quantized_kernel

POINTER = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
TABLE_DIMS = [("fp32", 1), ("fp32", 16), ("fp16", 16), ("bf16", 64), ("fp32", 10), ("fp32", 512)]


@dataclass(frozen=True)
class Specimen:
    """signature: argument -> Triton type. constants: values of the tl.constexpr arguments."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]


def specimens(device_type: str) -> Iterator[Specimen]:
    for table, dim in TABLE_DIMS:
        tile = Tile.of(dim, device_type)
        shape = {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns}
        yield from _lookups(table, dim, shape)
        for optimizer in ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"):
            yield from _updates(table, dim, shape, optimizer)
    for dim in (1, 15, 16, 64, 512):
        for bits in (8, 4):
            yield from _quantized(dim, bits, device_type)


def _lookups(table: str, dim: int, shape: dict[str, int]) -> Iterator[Specimen]:
    pointer = POINTER[table]
    for wide in (False, True) if dim == 16 else (False,):
        rows = "*i64" if wide else "*i32"
        counts = {"num_outputs": "i32", "num_rows": "i64" if wide else "i32"}
        yield Specimen(
            f"gather-{table}-{dim}-{rows[1:]}",
            gather_kernel,
            {"table": pointer, "rows": rows, "out": "*fp32", **counts},
            {**shape, "WIDE": wide},
        )
        for scaled in (False, True):
            indices = {"rows": rows, "scale": "*fp32" if scaled else rows, "starts": "*i32", "lengths": "*i32"}
            yield Specimen(
                f"pool-{table}-{dim}-{rows[1:]}-{'weighted-mean' if scaled else 'sum'}",
                pool_kernel,
                {"table": pointer, **indices, "share": "*fp32" if scaled else rows, "out": "*fp32", **counts},
                {**shape, "HAS_SCALE": scaled, "HAS_SHARE": scaled, "WIDE": wide},
            )


def _quantized(dim: int, bits: int, device_type: str) -> Iterator[Specimen]:
    piece = code_bytes(dim, bits)
    tile = Tile.of(piece, device_type)
    shape = {"DIM": dim, "PIECE": piece, "STRIDE": row_bytes(dim, bits), "HALVES": bits == 4, "BLOCK": tile.rows, "COLUMNS": tile.columns}
    for wide in (False, True) if dim == 16 else (False,):
        numbers = {"scale": "*fp32", "bias": "*fp32", "out": "*fp32", "num_outputs": "i32", "num_rows": "i64" if wide else "i32"}
        rows = "*i64" if wide else "*i32"
        signature = {"codes": "*u8", "rows": rows, **numbers}
        yield Specimen(f"quantized-int{bits}-{dim}-{rows[1:]}", quantized_kernel, signature, {**shape, "WIDE": wide})


def _updates(table: str, dim: int, shape: dict[str, int], optimizer: str) -> Iterator[Specimen]:
    pointer = POINTER[table]
    has_state = optimizer in ("adagrad", "adam", "ftrl")
    tensors = {
        "weight": pointer,
        "first": "*fp32" if has_state else pointer,
        "second": "*fp32" if optimizer in ("adam", "ftrl") else pointer,
    }
    per_row = {"row_state": "*fp32", "correction": "*fp32", "grad": "*fp32", "entries": "*i32", "scale": "*fp32", "rows": "*i32"}
    per_segment = {"starts": "*i32", "lengths": "*i32", "lr": "*fp32", "grad_scale": "*fp32", "num_segments": "i32", "num_grads": "i32"}
    numbers = ("weight_decay", "max_gradient", "max_row_norm", *(f"constant{i}" for i in range(5)))
    signature = {**tensors, **per_row, **per_segment, **dict.fromkeys(numbers, "fp32")}
    for limited in (False, True) if dim == 16 else (False,):
        flags = dict.fromkeys(("HAS_SCALE", "HAS_GRAD_SCALE", "CLIPS_VALUES", "CLIPS_NORM", "DECAYS"), limited)
        name = f"update-{optimizer}-{table}-{dim}{'-limited' if limited else ''}"
        yield Specimen(name, update_kernel, signature, {"OPTIMIZER": optimizer, **shape, **flags, "WIDE": False})
