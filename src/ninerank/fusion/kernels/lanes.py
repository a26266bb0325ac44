"""Arithmetic on several columns of a row at once, in Numba kernels, for tables of any float type.

Loops over a row's columns are short (the embedding dim), and LLVM's vectoriser gives up on them: the tables that a
kernel reads and writes might overlap for all it knows. So kernels say what they mean: a value holds `width` columns,
8 or 4 where the dim is divisible, else 1, and one source serves all:

    ops = arithmetic(fixed, dtype)
    for column in range(0, dim, ops.width):
        ops.store(table, base + column, ops.load(table, base + column) - ops.each(lr) * ops.get(total, column))

+ - * / work on such values; `load` and `store` convert tables of float16 and bfloat16 (passed as uint16 bits) to float32
and back, exactly and with rounding to nearest even. Indices are flat and not checked; arrays must be contiguous. It is one module: the
type, its operators and what they compile to mean nothing without each other.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model

from ninerank.fusion.kernels.jit import CACHE_LINE_BYTES, jit_inline

__all__ = ["Arithmetic", "arithmetic", "code_loads", "exponential", "row_buffer"]

WIDTHS = (8, 4)
FLOAT, INT8, INT16, INT32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)


class Lanes(types.Type):
    """Numba type of `width` float32 numbers in a vector register."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Lanes({width})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, ir.VectorType(FLOAT, lanes.width))


@dataclass(frozen=True)
class Arithmetic:
    """Compiled functions on values of `width` columns of float32.

    load(table, index), store(table, index, value): of the table's type. get, put: the same of float32 arrays. stream: put past the
    cache, for what nobody reads soon; the index must be a multiple of `width` and the array lie on a cache line.
    each(number): the number in every column. root: square root. at_least, at_most(value, bound): NaN stays NaN.
    size: absolute value. signed(size, sign): copysign. total(value): sum of the columns.
    where_positive(value, number): the value where the number is above 0, else 0.
    """

    width: int
    load: Any
    store: Any
    get: Any
    put: Any
    stream: Any
    each: Any
    root: Any
    at_least: Any
    at_most: Any
    size: Any
    signed: Any
    total: Any
    where_positive: Any


@cache
def arithmetic(fixed: int, dtype: torch.dtype) -> Arithmetic:
    """Arithmetic for kernels of a fixed dim (0: any dim, one column at a time) on tables of `dtype`."""
    value = _value(fixed)
    return Arithmetic(
        width=value.width if isinstance(value, Lanes) else 1,
        load=_load(value, dtype),
        store=_store(value, dtype),
        get=_load(value, torch.float32),
        put=_store(value, torch.float32),
        stream=_store(value, torch.float32, streams=True),
        each=_each(value),
        root=_function(value, "sqrt", 1),
        at_least=_bounded(value, "<"),
        at_most=_bounded(value, ">"),
        size=_function(value, "fabs", 1),
        signed=_function(value, "copysign", 2),
        total=_total(value),
        where_positive=_where_positive(value),
    )


def _value(fixed: int) -> Any:
    """Numba type of a value in kernels of a fixed dim."""
    width = next((width for width in WIDTHS if fixed and fixed % width == 0), 1)
    return types.float32 if width == 1 else Lanes(width)


def _shaped(element: Any, value: Any) -> Any:
    """LLVM type of as many elements as the value has columns."""
    return ir.VectorType(element, value.width) if isinstance(value, Lanes) else element


def _constant(element: Any, value: Any, number: float) -> Any:
    return ir.Constant(_shaped(element, value), [number] * value.width if isinstance(value, Lanes) else number)


def _check_contiguous(array_type: Any) -> None:
    if not isinstance(array_type, types.Array) or array_type.layout != "C":
        raise TypingError(f"{array_type}: elements are counted from the start of a contiguous array")


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any, stored: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), stored.as_pointer())


def _load(value: Any, dtype: torch.dtype) -> Any:
    stored, decode, _ = _CODECS[dtype]
    stored_bytes = dtype.itemsize

    @intrinsic
    def load(typing_context: Any, table: Any, index: Any) -> Any:
        _check_contiguous(table)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _shaped(stored, value))
            return decode(builder, builder.load(address, align=stored_bytes), value)

        return value(table, types.int64), generate

    return load


def _store(value: Any, dtype: torch.dtype, *, streams: bool = False) -> Any:
    stored, _, encode = _CODECS[dtype]
    stored_bytes = dtype.itemsize

    @intrinsic
    def store(typing_context: Any, table: Any, index: Any, number: Any) -> Any:
        _check_contiguous(table)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _shaped(stored, value))
            number, columns = encode(builder, arguments[2], value), value.width if isinstance(value, Lanes) else 1
            written = builder.store(number, address, align=columns * stored_bytes if streams else stored_bytes)
            if streams:
                written.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))
            return context.get_dummy_value()

        return types.void(table, types.int64, value), generate

    return store


@cache
def code_loads(fixed: int) -> tuple[Any, Any, Any]:
    """Compiled `(table, index) -> value` of unsigned bytes as float32: the whole bytes, their low halves, their high halves."""
    value = _value(fixed)

    def load_by(part: Callable[[Any, Any], Any]) -> Any:
        @intrinsic
        def load(typing_context: Any, table: Any, index: Any) -> Any:
            _check_contiguous(table)

            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _shaped(INT8, value))
                code = part(builder, builder.zext(builder.load(address, align=1), _shaped(INT32, value)))
                return builder.sitofp(code, _shaped(FLOAT, value))

            return value(table, types.int64), generate

        return load

    return (
        load_by(lambda builder, code: code),
        load_by(lambda builder, code: builder.and_(code, _constant(INT32, value, 15))),
        load_by(lambda builder, code: builder.lshr(code, _constant(INT32, value, 4))),
    )


# exp(r) for |r| <= log(2) / 2, highest power first (Moshier's Cephes library, expf), and log(2) in two parts.
EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG2_E, LOG_2_HIGH, LOG_2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
EXP_BOUNDS = (-87.3, 88.0)


@cache
def exponential(fixed: int) -> Any:
    """Compiled `(value) -> value` of e to each column, relative error below 4e-7; held to e^-87.3 ... e^88, NaN stays NaN."""
    value = _value(fixed)

    @intrinsic
    def compute(typing_context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def constant(x: float) -> Any:
                return _constant(FLOAT, value, x)

            x = arguments[0]
            for beyond, bound in zip("<>", EXP_BOUNDS, strict=True):
                x = builder.select(builder.fcmp_ordered(beyond, x, constant(bound)), constant(bound), x)
            kind = _shaped(FLOAT, value)
            suffix = f"v{value.width}f32" if isinstance(value, Lanes) else "f32"
            rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.rint.{suffix}")
            power = builder.call(rint, [builder.fmul(x, constant(LOG2_E))])
            rest = builder.fsub(builder.fsub(x, builder.fmul(power, constant(LOG_2_HIGH))), builder.fmul(power, constant(LOG_2_LOW)))
            total = constant(EXP_POLYNOMIAL[0])
            for coefficient in EXP_POLYNOMIAL[1:]:
                total = builder.fadd(builder.fmul(total, rest), constant(coefficient))
            total = builder.fadd(builder.fadd(builder.fmul(builder.fmul(total, rest), rest), rest), constant(1.0))
            exponent = builder.add(builder.fptosi(power, _shaped(INT32, value)), _constant(INT32, value, 127))
            return builder.fmul(total, builder.bitcast(builder.shl(exponent, _constant(INT32, value, 23)), kind))

        return value(value), generate

    return compute


def _each(value: Any) -> Any:
    @intrinsic
    def each(typing_context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if not isinstance(value, Lanes):
                return arguments[0]
            first = builder.insert_element(ir.Constant(_shaped(FLOAT, value), ir.Undefined), arguments[0], INT32(0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT32, value.width), [0] * value.width))

        return value(types.float32), generate

    return each


def _function(value: Any, name: str, arity: int) -> Any:
    """Elementwise LLVM function."""

    def call(builder: Any, arguments: Any) -> Any:
        kind = _shaped(FLOAT, value)
        suffix = f"v{value.width}f32" if isinstance(value, Lanes) else "f32"
        declared = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * arity), f"llvm.{name}.{suffix}")
        return builder.call(declared, arguments)

    if arity == 1:

        @intrinsic
        def unary(typing_context: Any, first: Any) -> Any:
            return value(value), lambda context, builder, signature, arguments: call(builder, arguments)

        return unary

    @intrinsic
    def binary(typing_context: Any, first: Any, second: Any) -> Any:
        return value(value, value), lambda context, builder, signature, arguments: call(builder, arguments)

    return binary


def _bounded(value: Any, beyond: str) -> Any:
    @intrinsic
    def bounded(typing_context: Any, number: Any, bound: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.select(builder.fcmp_ordered(beyond, *arguments), arguments[1], arguments[0])

        return value(value, value), generate

    return bounded


def _where_positive(value: Any) -> Any:
    @intrinsic
    def where(typing_context: Any, number: Any, sign: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = _constant(FLOAT, value, 0.0)
            return builder.select(builder.fcmp_ordered(">", arguments[1], zero), arguments[0], zero)

        return value(value, value), generate

    return where


def _total(value: Any) -> Any:
    @intrinsic
    def total(typing_context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if not isinstance(value, Lanes):
                return arguments[0]
            # Halves added to halves.
            vector, width = arguments[0], value.width
            while width > 1:
                width //= 2
                low = ir.Constant(ir.VectorType(INT32, width), list(range(width)))
                high = ir.Constant(ir.VectorType(INT32, width), list(range(width, 2 * width)))
                vector = builder.fadd(builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high))
            return builder.extract_element(vector, INT32(0))

        return types.float32(value), generate

    return total


def _define(python_operator: Callable[..., Any], instruction: str) -> None:
    @intrinsic
    def compute(typing_context: Any, first: Any, second: Any) -> Any:
        return first(first, first), lambda context, builder, signature, arguments: getattr(builder, instruction)(*arguments)

    # No annotations: Numba compares the two signatures, annotations too.
    def implementation(first, second):
        return compute(first, second)

    @overload(python_operator)
    def of_lanes(first, second):
        return implementation if isinstance(first, Lanes) and first == second else None


for _operator, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _define(_operator, _instruction)


def _same(builder: Any, number: Any, value: Any) -> Any:
    return number


def _decode_bfloat16(builder: Any, half: Any, value: Any) -> Any:
    bits = builder.shl(builder.zext(half, _shaped(INT32, value)), _constant(INT32, value, 16))
    return builder.bitcast(bits, _shaped(FLOAT, value))


def _encode_bfloat16(builder: Any, number: Any, value: Any) -> Any:
    bits = builder.bitcast(number, _shaped(INT32, value))
    last = builder.and_(builder.lshr(bits, _constant(INT32, value, 16)), _constant(INT32, value, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(last, _constant(INT32, value, 0x7FFF))), _constant(INT32, value, 16))
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(is_nan, _constant(INT32, value, 0x7FC0), rounded), _shaped(INT16, value))


def _decode_float16(builder: Any, half: Any, value: Any) -> Any:
    ints, floats = _shaped(INT32, value), _shaped(FLOAT, value)
    bits = builder.zext(half, ints)
    # Exponent and fraction as they are, then the difference of the exponents' biases (127 - 15) by a multiplication.
    size = builder.bitcast(builder.shl(builder.and_(bits, _constant(INT32, value, 0x7FFF)), _constant(INT32, value, 13)), floats)
    scaled = builder.fmul(size, _constant(FLOAT, value, 2.0**112))
    is_special = builder.fcmp_ordered(">=", scaled, _constant(FLOAT, value, 65536.0))
    special = builder.select(is_special, _constant(INT32, value, 0x7F800000), _constant(INT32, value, 0))
    sign = builder.shl(builder.and_(bits, _constant(INT32, value, 0x8000)), _constant(INT32, value, 16))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(scaled, ints), special), sign), floats)


def _encode_float16(builder: Any, number: Any, value: Any) -> Any:
    def constant(bits: int) -> Any:
        return _constant(INT32, value, bits)

    ints, floats = _shaped(INT32, value), _shaped(FLOAT, value)
    bits = builder.bitcast(number, ints)
    sign = builder.and_(builder.lshr(bits, constant(16)), constant(0x8000))
    size = builder.and_(bits, constant(0x7FFFFFFF))
    # Below 2^-14 the target is subnormal: adding 0.5 lets the float adder round at its last bit.
    lifted = builder.fadd(builder.bitcast(size, floats), _constant(FLOAT, value, 0.5))
    small = builder.sub(builder.bitcast(lifted, ints), constant(0x3F000000))
    last = builder.and_(builder.lshr(size, constant(13)), constant(1))
    normal = builder.lshr(builder.add(builder.sub(size, constant((112 << 23) - 0xFFF)), last), constant(13))
    special = builder.select(builder.icmp_unsigned(">", size, constant(0x7F800000)), constant(0x7E00), constant(0x7C00))
    normal = builder.select(builder.icmp_unsigned("<", size, constant(0x47800000)), normal, special)
    half = builder.select(builder.icmp_unsigned("<", size, constant(0x38800000)), small, normal)
    return builder.trunc(builder.or_(half, sign), _shaped(INT16, value))


# What is stored, how it becomes float32, and how float32 becomes it.
_CODECS: dict[torch.dtype, tuple[Any, Callable[..., Any], Callable[..., Any]]] = {
    torch.float32: (FLOAT, _same, _same),
    torch.float16: (INT16, _decode_float16, _encode_float16),
    torch.bfloat16: (INT16, _decode_bfloat16, _encode_bfloat16),
}


def row_buffer(fixed: int) -> Any:
    """Compiled `buffer(any_dim)`: room for one row of float32, on the stack where the dim is fixed. Call it outside loops."""
    if fixed == 0:

        @jit_inline
        def heap_buffer(any_dim):
            return np.empty(any_dim, np.float32)

        return heap_buffer

    @intrinsic
    def on_stack(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            room = cgutils.alloca_once(builder, ir.ArrayType(FLOAT, fixed), name="row")
            room.align = CACHE_LINE_BYTES
            return builder.bitcast(room, FLOAT.as_pointer())

        return types.CPointer(types.float32)(), generate

    @jit_inline
    def stack_buffer(any_dim):
        return numba.carray(on_stack(), (fixed,))

    return stack_buffer
