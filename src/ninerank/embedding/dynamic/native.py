"""What the kernels of this package share: a strong 64-bit mixer, keyed streams and a prefetch of memory."""

import hashlib
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ninerank.features.native import jit

__all__ = ["AHEAD", "GOLDEN", "mix64", "prefetch", "share", "stream", "stream_key"]

# Ids ahead of the one at work whose cache line is fetched: memory latency over the time one id takes.
AHEAD = 16
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
M1, M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
S27, S30, S31, S32 = (np.uint64(n) for n in (27, 30, 31, 32))


def _prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of element `index` (int64) of a C-contiguous array's memory; never faults."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        function_type = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(function, [address, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


prefetch: Any = intrinsic(_prefetch)


@jit
def mix64(word):  # type: ignore[no-untyped-def]
    """Bijection of uint64 whose every output bit depends on every input bit: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    word = (word ^ (word >> S30)) * M1
    word = (word ^ (word >> S27)) * M2
    return word ^ (word >> S31)


@jit
def stream(key, word, place):  # type: ignore[no-untyped-def]
    """Random word number `place` (int64) of the stream that key and word (uint64) open: SplitMix64 from a mixed start."""
    return mix64(mix64(word ^ key) + GOLDEN * (np.uint64(place) + np.uint64(1)))


@jit
def share(word, parts):  # type: ignore[no-untyped-def]
    """Part (int64) of `parts` < 2^32 that a random word falls into, each of them equally likely (Lemire, TOMACS 2019)."""
    return np.int64(((word >> S32) * np.uint64(parts)) >> S32)


def stream_key(*names: object) -> np.uint64:
    """Key of a family of streams, from whatever tells it apart (seed, purpose, table)."""
    text = "\0".join(str(name) for name in names)
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
