"""What is read off the Linalg of a kernel, on texts as short as can be."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def linalg() -> ModuleType:
    spec = importlib.util.spec_from_file_location("devices_linalg", Path(__file__).with_name("linalg.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kernel(*body: str) -> str:
    return "\n".join(["func.func @k(%arg0: memref<?xf32>) {", "scf.for %i = %c0 to %c9 step %c1 : i32 {", *body, "}", "return", "}"])


LANES = ("%a = linalg.generic {} ins(%x, %y : tensor<8xi32>) outs(%o : tensor<8xi1>) {", "^bb0(%in: i32, %in_1: i32, %out: i1):")
TILE = ("%t = scf.for %r = %c0 to %c8 step %c1 iter_args(%s = %e) -> (tensor<8x{0}xf32>) {{",)
TILE += ("%u = scf.for %c = %c0 to %c{0} step %c1 iter_args(%v = %s) -> (tensor<8x{0}xf32>) {{",)
TILE += ("%n = tensor.insert %l into %v[%r, %c] : tensor<8x{0}xf32>", "}} {{ExtractedLoadOrStore}}", "}} {{ExtractedLoadOrStore}}")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (("memref.store %v, %arg0[%i] : memref<?xf32>",), "stores single elements"),
        ((*LANES, "%c = arith.cmpi slt, %in, %in_1 : i32", "linalg.yield %c : i1", "} -> tensor<8xi1>"), "compares integers"),
        ((*LANES, "%c = arith.addi %in, %in_1 : i64", "linalg.yield %c : i64", "} -> tensor<8xi64>"), "64-bit integers"),
        (tuple(line.format(16) for line in TILE), "element by element"),
    ],
)
def test_slow_code_is_named(linalg: ModuleType, body: tuple[str, ...], found: str) -> None:
    (only,) = linalg.slow_code(kernel(*body))
    assert found in only


def test_scalar_bounds_row_copies_and_narrow_rows_are_no_slow_code(linalg: ModuleType) -> None:
    assert (
        linalg.slow_code(kernel("%c = arith.cmpi slt, %i, %arg0 : i32", "memref.copy %a, %b : memref<1x16xf32> to memref<1x16xf32>")) == []
    )
    narrow = kernel(*(line.format(10) for line in TILE))
    assert linalg.slow_code(narrow) == []
    assert linalg.narrow_rows(narrow)


def test_buffers_are_counted_while_they_are_needed(linalg: ModuleType) -> None:
    add = "linalg.generic {{}} ins({0}, {1} : tensor<256xf32>, tensor<256xf32>) outs({2} : tensor<256xf32>) {{\n}} -> tensor<256xf32>"
    chain = ["%e = tensor.empty() : tensor<256xf32>"]
    chain += [f"%{name} = linalg.fill ins(%z : f32) outs(%e : tensor<256xf32>) -> tensor<256xf32>" for name in ("a", "b")]
    in_place = kernel(*chain, "%c = " + add.format("%a", "%b", "%a"), "%d = " + add.format("%c", "%c", "%c"))
    assert linalg.peak_bytes(in_place) == 2 * 1024
    kept = kernel(*chain, "%c = " + add.format("%a", "%b", "%a"), "%d = " + add.format("%c", "%a", "%c"))
    assert linalg.peak_bytes(kept) == 3 * 1024
