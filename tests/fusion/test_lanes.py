"""Arithmetic on several columns at once: every operation is that of the single numbers, and 16-bit floats are torch's, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
import torch
from numba.core.errors import NumbaError
from torch import Tensor

from ninerank.fusion.kernels.jit import as_numpy
from ninerank.fusion.kernels.lanes import Arithmetic, arithmetic, row_buffer

ROOT = Path(__file__).parents[2]
HALVES = [torch.float16, torch.bfloat16]
WIDTHS = {1: 1, 3: 1, 0: 1, 12: 4, 100: 4, 8: 8, 16: 8}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("dim", "width"), WIDTHS.items())
def test_width_divides_the_dim(dim: int, width: int) -> None:
    assert arithmetic(dim, torch.float32).width == width


def _copy(dim: int, read: torch.dtype, write: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    load, store, width = arithmetic(dim, read).load, arithmetic(dim, write).store, arithmetic(dim, read).width

    @numba.njit
    def copy(source, target):  # type: ignore[no-untyped-def]
        for i in range(0, source.size, width):
            store(target, i, load(source, i))

    return lambda source, target: copy(as_numpy(source), as_numpy(target))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [1, 4, 8])
def test_decodes_every_bit_pattern(dtype: torch.dtype, dim: int) -> None:
    stored, found = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype), torch.empty(65536)
    _copy(dim, dtype, torch.float32)(stored, found)
    expected = stored.float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [1, 4, 8])
def test_encodes_with_rounding_to_nearest_even(dtype: torch.dtype, dim: int) -> None:
    representable = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    halfway = (representable[:-1] + representable[1:]) / 2
    anything = torch.randint(-(2**31), 2**31 - 1, (500_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = torch.cat([representable, halfway, torch.nextafter(halfway, torch.tensor(9e9)), anything.view(torch.float32)])
    values = values[: values.numel() // 8 * 8].contiguous()
    found = torch.empty(values.numel(), dtype=dtype)
    _copy(dim, torch.float32, dtype)(values, found)
    expected = values.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))


OPERATIONS: dict[str, tuple[Callable[[Arithmetic], object], Callable[[Tensor, Tensor], Tensor]]] = {
    "add": (lambda ops: numba.njit(lambda x, y: x + y), torch.add),
    "subtract": (lambda ops: numba.njit(lambda x, y: x - y), torch.sub),
    "multiply": (lambda ops: numba.njit(lambda x, y: x * y), torch.mul),
    "divide": (lambda ops: numba.njit(lambda x, y: x / y), torch.div),
    "signed": (lambda ops: ops.signed, torch.copysign),
    "at_least": (lambda ops: ops.at_least, lambda x, y: torch.where(x < y, y, x)),
    "at_most": (lambda ops: ops.at_most, lambda x, y: torch.where(x > y, y, x)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dim", [1, 4, 8])
def test_operations_are_those_of_numbers(name: str, dim: int) -> None:
    ops = arithmetic(dim, torch.float32)
    made, expected = OPERATIONS[name]
    load, store, width, function = ops.load, ops.store, ops.width, made(ops)

    @numba.njit(error_model="numpy")
    def run(x, y, out):  # type: ignore[no-untyped-def]
        for i in range(0, x.size, width):
            store(out, i, function(load(x, i), load(y, i)))

    special = torch.tensor([0.0, -0.0, 1.0, -2.5, INF, -INF, NAN, 1e-40])
    x, y = (part.reshape(-1).contiguous() for part in torch.meshgrid(special, special, indexing="ij"))
    out = torch.empty_like(x)
    run(as_numpy(x), as_numpy(y), as_numpy(out))
    assert torch.equal(out.nan_to_num(7.0), expected(x, y).nan_to_num(7.0))
    assert torch.equal(out.isnan(), expected(x, y).isnan())


@pytest.mark.parametrize("dim", [1, 4, 8])
def test_functions_of_one_value(dim: int) -> None:
    ops = arithmetic(dim, torch.float32)
    get, put, each, root, size, total, width = ops.get, ops.put, ops.each, ops.root, ops.size, ops.total, ops.width

    @numba.njit
    def run(x, roots, sizes, sums):  # type: ignore[no-untyped-def]
        for i in range(0, x.size, width):
            put(roots, i, root(size(get(x, i))))
            put(sizes, i, size(get(x, i)))
            put(sums, i, each(total(get(x, i))))

    x = torch.tensor([4.0, -9.0, 0.25, -0.0, 16.0, 1.0, -2.0, 3.0])
    roots, sizes, sums = (torch.empty(8) for _ in range(3))
    run(*(as_numpy(tensor) for tensor in (x, roots, sizes, sums)))
    assert torch.equal(roots, x.abs().sqrt())
    assert torch.equal(sizes, x.abs())
    assert torch.equal(sums, x.view(-1, width).sum(1).repeat_interleave(width))


@pytest.mark.parametrize("dim", [0, 16])
def test_buffers_are_each_calls_own(dim: int) -> None:
    buffer = row_buffer(dim)

    @numba.njit
    def run(any_dim):  # type: ignore[no-untyped-def]
        first, second = buffer(any_dim), buffer(any_dim)
        first[:], second[:] = 1, 2
        return first.sum(), second.sum(), first.size

    assert run(dim or 5) == (dim or 5, 2 * (dim or 5), dim or 5)


@pytest.mark.parametrize("operation", ["load", "store"])
def test_an_array_that_is_not_contiguous_is_refused(operation: str) -> None:
    ops = arithmetic(4, torch.float32)
    load, store = ops.load, ops.store

    @numba.njit
    def read(x):  # type: ignore[no-untyped-def]
        load(x, 0)

    @numba.njit
    def write(x, y):  # type: ignore[no-untyped-def]
        store(x, 0, load(y, 0))

    array = torch.zeros(8, 8).numpy()
    with pytest.raises(NumbaError, match="a contiguous array"):
        read(array.T[::2]) if operation == "load" else write(array[:, ::2], array)


SCRIPT = """
import sys, torch
from ninerank.fusion.kernels.embedding_bag import embedding_bag
from ninerank.fusion.kernels.embedding_update import Adagrad, embedding_update
for dim, dtype in ((16, torch.float32), (12, torch.float16), (3, torch.bfloat16)):
    weight = torch.linspace(-1, 1, 40 * dim).view(40, dim).to(dtype)
    rows, grad = torch.arange(60, dtype=torch.int32) % 40, torch.linspace(-1, 1, 60 * dim).view(60, dim)
    options = {"sample_weight_N": torch.linspace(0, 1, 60)}
    offsets = torch.arange(0, 61, 3)
    found, expected = (embedding_bag(weight, rows, offsets, 2, **options, kernel=kernel) for kernel in ("numba", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    results = []
    for kernel in ("numba", "torch"):
        own, optimizer = weight.clone(), Adagrad()
        state = optimizer.new_state(own, torch.ones(1))
        embedding_update(own, state, grad, rows, torch.tensor([0]), torch.tensor([0.1]), optimizer, kernel=kernel)
        results.append(own.float())
    torch.testing.assert_close(*results, rtol=2.0 ** -7 if dim == 3 else 1e-3 if dim == 12 else 1e-5, atol=1e-5)
"""


def test_a_processor_without_wide_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
