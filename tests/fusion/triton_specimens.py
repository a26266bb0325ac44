"""Every Triton kernel in the forms in which the operators launch it, for compilers to be tried on without a device.

Imported by path: by test_triton.py, which compiles for CUDA, and by ascend_lower.py, which runs where triton-ascend is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ninerank.fusion.kernels.dot_interaction.triton import dot_grad_kernel, dot_kernel
from ninerank.fusion.kernels.embedding_bag.triton import gather_kernel, pool_kernel
from ninerank.fusion.kernels.embedding_update.triton import update_kernel, update_tile
from ninerank.fusion.kernels.fm_interaction.triton import fm_grad_kernel, fm_kernel
from ninerank.fusion.kernels.hstu_attention.triton import hstu_kernel, hstu_key_grad_kernel, hstu_query_grad_kernel, hstu_tile
from ninerank.fusion.kernels.jagged_attention.triton import attention_kernel, gradient_kernel
from ninerank.fusion.kernels.jagged_pairs.triton import key_grad_kernel, pair_kernel, query_grad_kernel
from ninerank.fusion.kernels.launch import Tile
from ninerank.fusion.kernels.low_rank_cross.triton import COLUMNS, ROWS, combine_kernel, product_kernel
from ninerank.fusion.kernels.mlp_layer.triton import layer_grad_kernel, layer_kernel
from ninerank.fusion.kernels.quantized_rows import code_bytes, row_bytes
from ninerank.fusion.kernels.quantized_rows.triton import quantized_kernel
from ninerank.fusion.kernels.sigmoid_gate.triton import gate_grad_kernel, gate_kernel

POINTER = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
TABLE_DIMS = [("fp32", 1), ("fp32", 16), ("fp16", 16), ("bf16", 64), ("fp32", 10), ("fp16", 10), ("fp32", 512)]


@dataclass(frozen=True)
class Specimen:
    """signature: argument -> Triton type. constants: values of the tl.constexpr arguments."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]


def specimens(device_type: str) -> Iterator[Specimen]:
    for table, dim in TABLE_DIMS:
        tile = Tile.of(dim, device_type, gathered_bytes=4 if table == "fp32" else 2)
        shape = {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns}
        yield from _lookups(table, dim, shape)
        for optimizer in ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"):
            own = update_tile(optimizer, dim, device_type)
            yield from _updates(table, dim, {"DIM": dim, "BLOCK": own.rows, "COLUMNS": own.columns}, optimizer)
    for dim in (1, 10, 16, 64):
        yield from _jagged(dim, device_type)
        yield from _interactions(dim, device_type)
    yield from _crosses()
    yield from _layers()
    for dim in (16, 64):
        yield from _hstu(dim, device_type)
    for dim in (1, 16, 40, 80):
        yield _gate(dim, device_type)
        yield _gate_grad(dim, device_type)
    for dim in (1, 15, 16, 64, 512):
        for bits in (8, 4):
            yield from _quantized(dim, bits, device_type)


def _gate_grad(dim: int, device_type: str) -> Specimen:
    tile = Tile.of(dim, device_type, many=True)
    names = ("grad", "x", "shift", "scale", "base", "slope", "x_grad", "sums")
    constants = {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns}
    return Specimen(f"sigmoid-gate-back-{dim}", gate_grad_kernel, {**_floats(*names), "num_rows": "i32"}, constants)


def _gate(dim: int, device_type: str) -> Specimen:
    tile = Tile.of(dim, device_type)
    vectors = dict.fromkeys(("shift", "scale", "base", "slope"), "*fp32")
    arguments = {"x": "*bf16", **vectors, "out": "*fp32", "num_rows": "i32"}
    return Specimen(f"sigmoid-gate-{dim}", gate_kernel, arguments, {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns})


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
    tile = Tile.of(piece, device_type, gathered_bytes=1)
    shape = {"DIM": dim, "PIECE": piece, "STRIDE": row_bytes(dim, bits), "HALVES": bits == 4, "BLOCK": tile.rows, "COLUMNS": tile.columns}
    for wide in (False, True) if dim == 16 else (False,):
        numbers = {"scale": "*fp32", "bias": "*fp32", "out": "*fp32", "num_outputs": "i32", "num_rows": "i64" if wide else "i32"}
        rows = "*i64" if wide else "*i32"
        signature = {"codes": "*u8", "rows": rows, **numbers}
        yield Specimen(f"quantized-int{bits}-{dim}-{rows[1:]}", quantized_kernel, signature, {**shape, "WIDE": wide})


def _jagged(dim: int, device_type: str) -> Iterator[Specimen]:
    tile = Tile.of(dim, device_type, gathered_bytes=4)
    shape = {"DIM": dim, "BLOCK": tile.rows, "COLUMNS": tile.columns, "WIDE": False}
    counts = {"num_positions": "i32", "num_histories": "i32"}
    segments = {"starts": "*i32", "lengths": "*i32"}

    by_position = {**_floats("query", "key", "grad"), "histories": "*i32", **_floats("out", "key_grad")}
    for name, kernel, signature in (
        ("pairs", pair_kernel, {**by_position, **counts}),
        ("pairs-key", key_grad_kernel, {**by_position, **counts}),
        ("pairs-query", query_grad_kernel, {**_floats("grad", "key", "query_grad"), **segments, "num_histories": "i32"}),
    ):
        yield Specimen(f"{name}-fp32-{dim}", kernel, {key: signature[key] for key in kernel.arg_names if key in signature}, shape)
    for softmax in (False, True):
        name, constants = f"fp32-{dim}{'-softmax' if softmax else ''}", {**shape, "SOFTMAX": softmax}
        attend = {**_floats("score", "key"), **segments, **_floats("out", "log_total"), "num_histories": "i32"}
        yield Specimen(f"attention-{name}", attention_kernel, attend, constants)
        back = {**_floats("grad", "weight", "mean", "key"), "histories": "*i32", **_floats("score_grad", "key_grad"), **counts}
        yield Specimen(f"attention-back-{name}", gradient_kernel, back, constants)


def _floats(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*fp32")


def _interactions(dim: int, device_type: str) -> Iterator[Specimen]:
    tile = Tile.of(dim, device_type)
    shape = {"DIM": dim, "COLUMNS": tile.columns, "WIDE": False}
    counts = {"num_rows": "i32", "num_fields": "i32"}
    for name, forward, back, size in (
        ("fm", fm_kernel, fm_grad_kernel, {"BLOCK": tile.rows}),
        ("dot", dot_kernel, dot_grad_kernel, {"FIELDS": 32}),
    ):
        yield Specimen(f"{name}-fp32-{dim}", forward, {**_floats("fields", "out"), **counts}, {**shape, **size})
        yield Specimen(f"{name}-back-fp32-{dim}", back, {**_floats("grad", "fields", "fields_grad"), **counts}, {**shape, **size})


def _crosses() -> Iterator[Specimen]:
    counts = {"num_rows": "i32", "width": "i32"}
    for wide in (False, True):
        constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDE": wide}
        name = "-i64" if wide else ""
        yield Specimen(f"cross-fp32-16{name}", combine_kernel, {**_floats("x0", "z", "bias", "x", "out"), **counts}, constants)
        back = _floats("grad", "x0", "z", "bias", "x0_grad", "z_grad")
        yield Specimen(f"cross-back-fp32-16{name}", product_kernel, {**back, **counts}, constants)


def _hstu(dim: int, device_type: str) -> Iterator[Specimen]:
    rows, key_columns, value_columns = hstu_tile(dim, dim, device_type)
    counts = {"num_rows": "i32", "num_heads": "i32", "num_distances": "i32", "scale": "fp32"}
    constants = {"DIM": dim, "COLUMNS": key_columns, "VALUE_DIM": dim, "VALUE_COLUMNS": value_columns, "BLOCK": rows}
    constants |= {"DISTANCES": 128, "WIDE": False}
    given = _floats("q", "k", "v", "position")
    for name, kernel, place, results in (
        ("hstu", hstu_kernel, "before", ("out",)),
        ("hstu-query-back", hstu_query_grad_kernel, "before", ("of_q", "of_position")),
        ("hstu-key-back", hstu_key_grad_kernel, "behind", ("of_k", "of_v")),
    ):
        upstream = {} if name == "hstu" else _floats("grad")
        signature = {**upstream, **given, place: "*i32", **_floats(*results), **counts}
        yield Specimen(f"{name}-fp32-{dim}", kernel, signature, constants)


def _layers() -> Iterator[Specimen]:
    counts = {"num_rows": "i32", "width": "i32"}
    for relu, masked, wide in ((True, False, False), (False, True, False), (True, True, True)):
        constants = {"RELU": relu, "MASKED": masked, "ROWS": ROWS, "COLUMNS": COLUMNS, "WIDE": wide}
        name = f"{'-relu' if relu else ''}{'-masked' if masked else ''}-fp32-16{'-i64' if wide else ''}"
        yield Specimen(f"layer{name}", layer_kernel, {**_floats("z", "bias", "mask", "out"), **counts}, constants)
        back = {**_floats("grad", "a", "mask", "of_z", "of_mask"), **counts}
        yield Specimen(f"layer-back{name}", layer_grad_kernel, back, constants)


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
