"""What the Numba kernels share: compile settings, cache-line prefetch, and tables in 16-bit floats.

Numba knows no float16 or bfloat16 on CPU: such tables are passed as uint16 bits and converted here, to float32 exactly
and back with rounding to nearest even. Kernels are made for a fixed embedding dim D where that pays (`fixed_dim`),
since a loop of known length needs no prologue; compiled code is cached on disk beside this package, or in the user's
cache folder where that cannot be written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

__all__ = ["CODECS", "Codec", "as_numpy", "fixed_dim", "jit", "jit_inline", "prefetch", "row_buffer"]

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be reassociated (vector lanes) and multiply-adds fused; NaN and infinity keep their meaning, so that a
# diverged gradient is seen as such.
FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
CACHE_LINE_BYTES = 64
LARGEST_FIXED_DIM = 256


def jit(function: Function) -> Function:
    """Compile without the GIL, cached on disk."""
    compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST_MATH)(function)
    return cast(Function, compiled)


def jit_inline(function: Function) -> Function:
    """Compile as a part of its callers."""
    compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST_MATH, inline="always")(function)
    return cast(Function, compiled)


def fixed_dim(dim: int) -> int:
    """`dim` where a kernel of its own is worth compiling (1, or a multiple of 4 up to 256), else 0: the general kernel."""
    return dim if dim == 1 or (dim % 4 == 0 and dim <= LARGEST_FIXED_DIM) else 0


def as_numpy(tensor: Tensor) -> "np.ndarray[Any, np.dtype[Any]]":
    """View of a contiguous CPU tensor; 16-bit floats as uint16 bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """prefetch(array, index): bring the cache line of a contiguous array's element (flat index) nearer; no more than a hint."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32]), "llvm.prefetch.p0i8"
        )
        address = builder.bitcast(builder.gep(data, [arguments[1]]), byte_pointer)
        for_write, high_locality, data_cache = int32(1), int32(3), int32(1)
        builder.call(function, [address, for_write, high_locality, data_cache])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def row_buffer(fixed: int) -> Any:
    """Compiled `buffer(any_dim)`: room for one row of float32; on the stack where the dim is fixed.

    A loop that writes to the stack can be vectorised without asking whether the tables it reads overlap what it writes:
    kernels compute a row into a buffer first and store it after. Call it once, outside loops.
    """
    if fixed == 0:

        @jit_inline
        def heap_buffer(any_dim):
            return np.empty(any_dim, np.float32)

        return heap_buffer

    @intrinsic
    def on_stack(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            room = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), fixed), name="row")
            room.align = CACHE_LINE_BYTES
            return builder.bitcast(room, ir.FloatType().as_pointer())

        return types.CPointer(types.float32)(), generate

    @jit_inline
    def stack_buffer(any_dim):
        return numba.carray(on_stack(), (fixed,))

    return stack_buffer


def _reinterpret(source: Any, target: Any) -> Any:
    @intrinsic
    def reinterpret(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return reinterpret


_float_of_bits = _reinterpret(types.uint32, types.float32)
_bits_of_float = _reinterpret(types.float32, types.uint32)


@jit_inline
def _same(value):
    return value


@jit_inline
def _decode_bfloat16(bits):
    return _float_of_bits(np.uint32(bits) << np.uint32(16))


@jit_inline
def _encode_bfloat16(value):
    bits = _bits_of_float(np.float32(value))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@jit_inline
def _decode_float16(bits):
    half = np.uint32(bits)
    # Exponent and fraction as they are, then the difference of the exponents' biases (127 - 15) by a multiplication.
    value = _float_of_bits((half & np.uint32(0x7FFF)) << np.uint32(13)) * _float_of_bits(np.uint32((127 + 112) << 23))
    special = np.uint32(0x7F800000) if value >= np.float32(65536) else np.uint32(0)
    return _float_of_bits(_bits_of_float(value) | special | ((half & np.uint32(0x8000)) << np.uint32(16)))


@jit_inline
def _encode_float16(value):
    bits = _bits_of_float(np.float32(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = bits & np.uint32(0x7FFFFFFF)
    # Below 2^-14 the target is subnormal: adding 0.5 lets the float adder round at its last bit.
    small = _bits_of_float(_float_of_bits(size) + np.float32(0.5)) - np.uint32(0x3F000000)
    normal = (size - np.uint32(112 << 23) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    special = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    half = small if size < np.uint32(0x38800000) else (normal if size < np.uint32(0x47800000) else special)
    return np.uint16(half | sign)


@dataclass(frozen=True)
class Codec:
    """How one float type is kept in a table: `decode(stored) -> float32`, `encode(float32) -> stored`."""

    decode: Callable[..., Any]
    encode: Callable[..., Any]


CODECS = {
    torch.float32: Codec(_same, _same),
    torch.float16: Codec(_decode_float16, _encode_float16),
    torch.bfloat16: Codec(_decode_bfloat16, _encode_bfloat16),
}
