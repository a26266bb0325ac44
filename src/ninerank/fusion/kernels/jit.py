"""What the Numba kernels share: compile settings, the disk cache, arrays of tensors, and cache-line prefetch.

Kernels are made for a fixed embedding dim D where that pays (`fixed_dim`), since a loop of known length needs no
prologue. Compiled code is kept on disk beside this package, or in the user's cache folder where that cannot be written;
where neither can be, every process compiles anew.
"""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic
from torch import Tensor

from ninerank.fusion.kernels.threads import DONE, TAKEN

__all__ = [
    "CACHE_LINE_BYTES",
    "as_numpy",
    "fixed_dim",
    "jit",
    "jit_for",
    "jit_inline",
    "jit_shares",
    "prefetch",
    "rows_ahead",
    "share_of_histories",
]

Function = TypeVar("Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

# Sums may be reassociated (vector lanes) and multiply-adds fused; NaN and infinity keep their meaning, so that a
# diverged gradient is seen as such.
FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}
CACHE_LINE_BYTES = 64
LARGEST_FIXED_DIM = 256
PREFETCH_BYTES = 4096
MOST_ROWS_AHEAD = 32


class _Cache(FunctionCache):
    """Compiled code by signature, CPU, the sources of all kernels, and what the function was made for: a file for each.

    Numba's own key takes a closure's values as they pickle, which for compiled functions differs from process to process:
    it would never find anything. It looks at the function's own file, not at those of the functions compiled into it. And
    it numbers the files of a function, so that two processes that save different ones at once may find each other's.
    A file that cannot be read or written costs a compilation, no more.
    """

    def __init__(self, function: Any, made_for: tuple[object, ...]) -> None:
        super().__init__(function)
        self._made_for = repr(made_for)

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return str(signature), codegen.magic_tuple(), self._made_for, _sources()

    def _file_of(self, signature: Any, codegen: Any) -> IndexDataCacheFile:
        digest = hashlib.sha256(repr(self._index_key(signature, codegen)).encode()).hexdigest()
        name = f"{self._impl.filename_base}-{digest[:16]}"
        return IndexDataCacheFile(self._cache_path, name, self._impl.locator.get_source_stamp())

    def _load_overload(self, signature: Any, target_context: Any) -> Any:
        self._cache_file = self._file_of(signature, target_context.codegen())
        try:
            return super()._load_overload(signature, target_context)
        except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of unpickling
            logger.warning("compiled kernel %s cannot be read and is made again (%s)", self._cache_file._index_path, error)
            with suppress(OSError):
                self._cache_file.flush()
            return None

    def _save_overload(self, signature: Any, data: Any) -> None:
        self._cache_file = self._file_of(signature, data.codegen)
        try:
            super()._save_overload(signature, data)
        except OSError as error:
            logger.warning("compiled kernel %s cannot be kept (%s)", self._cache_file._index_path, error)


@cache
def _sources() -> str:
    """SHA-256 of the source of every kernel."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def _warn_of_no_cache() -> None:
    logger.warning("no folder for compiled kernels can be written; this process compiles its own (NUMBA_CACHE_DIR names a folder)")


def jit(function: Function) -> Function:
    """Compile without the GIL, cached on disk."""
    return jit_for()(function)


def jit_for(*made_for: object) -> Callable[[Function], Function]:
    """`jit` for a function made by another one for the values `made_for`: with the function's place, they tell what it does."""

    def compiled(function: Function) -> Function:
        dispatcher: Any = numba.njit(nogil=True, error_model="numpy", fastmath=FAST_MATH)(function)
        try:
            dispatcher._cache = _Cache(function, made_for)
        except RuntimeError:
            _warn_of_no_cache()
        return cast(Function, dispatcher)

    return compiled


def jit_shares(*made_for: object) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Compile `function(share, num_shares, *arguments) -> status` as a driver `(tickets, statuses, *arguments)` for `threads.run_shares`.

    Each thread that runs the driver takes shares by an atomic counter until none is left, without asking for the GIL in between.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., None]:
        work = numba.njit(nogil=True, error_model="numpy", fastmath=FAST_MATH)(function)

        @jit_for(function.__module__, function.__qualname__, *made_for)
        def drive(tickets, statuses, *arguments):
            share = fetch_add(tickets, TAKEN)
            while share < statuses.size:
                statuses[share] = work(share, statuses.size, *arguments)
                fetch_add(tickets, DONE)
                share = fetch_add(tickets, TAKEN)

        return cast("Callable[..., None]", drive)

    return compiled


def jit_inline(function: Function) -> Function:
    """Compile as a part of its callers."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath=FAST_MATH, inline="always")(function)
    return cast(Function, compiled)


def fixed_dim(dim: int) -> int:
    """`dim` where a kernel of its own is worth compiling (1, or a multiple of 4 up to 256), else 0: the general kernel."""
    return dim if dim == 1 or (dim % 4 == 0 and dim <= LARGEST_FIXED_DIM) else 0


def rows_ahead(row_bytes: int) -> int:
    """How many rows to prefetch ahead: enough to hide the memory's latency, few enough to stay in the first cache."""
    return max(4, min(MOST_ROWS_AHEAD, PREFETCH_BYTES // row_bytes))


def as_numpy(tensor: Tensor) -> "np.ndarray[Any, np.dtype[Any]]":
    """View of a contiguous CPU tensor; 16-bit floats as uint16 bits."""
    assert tensor.is_contiguous(), "kernels count elements from the start of an array"
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


@jit_inline
def share_of_histories(offsets, thread, num_threads):
    """First and end of the histories that are one thread's: about as many positions each."""
    count, positions = offsets.size - 1, np.int64(offsets[offsets.size - 1])
    first = np.searchsorted(offsets[:count], positions * thread // num_threads)
    end = count
    if thread + 1 < num_threads:
        end = np.searchsorted(offsets[:count], positions * (thread + 1) // num_threads)
    return first if thread else 0, end


@intrinsic
def fetch_add(typing_context: Any, counters: Any, index: Any) -> Any:
    """fetch_add(counters, index): what an int64 counter was, which is one more now; whatever was written before is seen by who reads it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [arguments[1]]), ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counters, index), generate


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
