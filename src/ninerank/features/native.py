"""Numba compilation for this room, and loads from the raw addresses of Arrow buffers.

Kernels take addresses rather than arrays: wrapping 40 columns as NumPy arrays costs more than encoding them.
Whoever passes an address keeps the buffer alive until the call returns. Hosts are little-endian, as Arrow is.
"""

import logging
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["jit", "load_f64", "load_i32", "load_i64", "load_u8", "load_u32", "load_u64"]

logger = logging.getLogger(__name__)


def jit(function: Callable[..., Any]) -> Any:
    """Compile on first call without the GIL, one thread, no fast maths; the machine code is cached on disk where a place can be written.

    The place is `$NUMBA_CACHE_DIR`, else beside the module, else the user's cache directory.
    """
    try:
        compiled = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        logger.info("numba keeps no compiled code (%s); set NUMBA_CACHE_DIR to a writable directory for faster starts", error)
        compiled = numba.njit(nogil=True)(function)
    return compiled


def _load(value_type: Any, bits: ir.Type) -> Any:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            loaded = builder.load(builder.inttoptr(arguments[0], bits.as_pointer()))
            loaded.align = 1
            return builder.zext(loaded, ir.IntType(64)) if value_type is types.uint64 and bits.width < 64 else loaded

        return value_type(types.int64), codegen

    return intrinsic(load)


load_u8 = _load(types.uint64, ir.IntType(8))
load_u32 = _load(types.uint64, ir.IntType(32))
load_u64 = _load(types.uint64, ir.IntType(64))
load_i32 = _load(types.int32, ir.IntType(32))
load_i64 = _load(types.int64, ir.IntType(64))
load_f64 = _load(types.float64, ir.DoubleType())
