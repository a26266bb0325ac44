"""What the kernels of this package need of raw memory: stores, copies, comparison, and the ordered accesses of a sequence lock.

Addresses are int64; whoever passes one keeps the memory alive until the call returns. Loads are those of `features.native`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ninerank.features.native import jit, load_u8, load_u64

__all__ = ["copy", "equal", "fence", "load_sequence", "prefetch", "store_i64", "store_sequence", "store_u8", "store_u32"]

SEQUENCE_BYTES = 8


def _store(bits: ir.Type) -> Any:
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value_bits = ir.IntType(bits.width)
            given = arguments[1]
            if given.type.width > bits.width:
                given = builder.trunc(given, value_bits)
            elif given.type.width < bits.width:
                given = builder.zext(given, value_bits)
            stored = builder.store(given, builder.inttoptr(arguments[0], value_bits.as_pointer()))
            stored.align = 1
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return intrinsic(store)


store_u8 = _store(ir.IntType(8))
store_u32 = _store(ir.IntType(32))
store_i64 = _store(ir.IntType(64))


def _load_sequence(typingctx: Any, address: Any) -> Any:
    """Sequence number (int64) at an aligned address; what follows in the program is read after it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", SEQUENCE_BYTES)

    return types.int64(types.int64), codegen


def _store_sequence(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a sequence number (int64) at an aligned address; what comes before in the program is visible first."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", SEQUENCE_BYTES)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _fence(typingctx: Any) -> Any:
    """Neither the compiler nor the processor moves an access over it."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address (int64); never faults."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(function, [builder.inttoptr(arguments[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


prefetch: Any = intrinsic(_prefetch)
load_sequence: Any = intrinsic(_load_sequence)
store_sequence: Any = intrinsic(_store_sequence)
fence: Any = intrinsic(_fence)


@jit
def copy(target, source, size):  # type: ignore[no-untyped-def]
    """Copy `size` bytes between places that do not overlap."""
    words = size >> 3
    for word in range(words):
        store_i64(target + 8 * word, np.int64(load_u64(source + 8 * word)))
    for byte in range(8 * words, size):
        store_u8(target + byte, np.int64(load_u8(source + byte)))


@jit
def equal(one, other, size):  # type: ignore[no-untyped-def]
    """Whether `size` bytes at both addresses are the same."""
    words = size >> 3
    for word in range(words):
        if load_u64(one + 8 * word) != load_u64(other + 8 * word):
            return False
    byte = 8 * words
    while byte < size and load_u8(one + byte) == load_u8(other + byte):
        byte += 1
    return byte >= size
