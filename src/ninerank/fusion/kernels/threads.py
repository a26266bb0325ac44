"""Runs a compiled (GIL-free) function on several threads at once.

OpenMP inside Numba would start a second pool beside torch's own, and its default layer aborts the process when it is
entered from two threads. Here the caller's thread takes the first share and a plain pool the rest, so that any number
of callers may be inside at once. A function must not wait for its peers: shares run in any order, maybe one by one.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["num_threads_for", "run", "run_each"]

Result = TypeVar("Result")

ELEMENTS_PER_THREAD = 1 << 16

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def num_threads_for(num_elements: int) -> int:
    """Threads worth waking for `num_elements` numbers to be read and written: at most torch.get_num_threads()."""
    return max(1, min(torch.get_num_threads(), num_elements // ELEMENTS_PER_THREAD))


def run(function: Callable[..., Result], num_threads: int, *arguments: object) -> list[Result]:
    """`[function(t, num_threads, *arguments) for t in range(num_threads)]`, all at once."""
    return run_each(function, [(thread, num_threads, *arguments) for thread in range(num_threads)])


def run_each(function: Callable[..., Result], arguments: Sequence[tuple[object, ...]]) -> list[Result]:
    """`[function(*a) for a in arguments]`, one thread each."""
    if len(arguments) == 1:
        return [function(*arguments[0])]
    pool = _get_pool()
    others = [pool.submit(function, *own) for own in arguments[1:]]
    try:
        first = function(*arguments[0])
    finally:
        wait(others)
    return [first, *(other.result() for other in others)]


def _get_pool() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool a process, made when first needed
    if _pool is None:
        with _lock:
            if _pool is None:
                _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="ninerank-kernel")
    return _pool


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
