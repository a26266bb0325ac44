"""Runs a compiled (GIL-free) function on several threads at once.

OpenMP inside Numba would start a second pool beside torch's own, and its default layer aborts the process when it is
entered from two threads. Here helpers are plain threads that any number of callers may ask at once. Work is cut into
shares which whoever is awake takes: the caller begins with the first and goes on until none is left, so that it never
waits for a helper that has yet to wake (on a busy machine that can take longer than the work), only for shares that a
helper has begun. A function must not wait for its peers: shares run in any order, maybe all on one thread.

`run` takes shares in Python. `run_shares` takes them inside compiled code (`jit.jit_shares`): for many small ones.
"""

import atexit
import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import torch

__all__ = ["DONE", "TAKEN", "num_threads_for", "run", "run_each", "run_shares"]

Result = TypeVar("Result")

ELEMENTS_PER_THREAD = 1 << 16
# Places of the counters of `run_shares` in its tickets, each in a cache line of its own.
TAKEN, DONE, NUM_TICKETS = 0, 16, 32
POLLS_BEFORE_SLEEP, SLEEP_S = 200, 2e-5
MOST_GUIDED = 7
LONG_WAIT_S = 1e-3
FEWEST_ALONE, MOST_ALONE = 8, 64


def num_threads_for(num_elements: int) -> int:
    """Threads worth waking for `num_elements` numbers to be read and written: at most torch.get_num_threads()."""
    return max(1, min(torch.get_num_threads(), num_elements // ELEMENTS_PER_THREAD))


def run(function: Callable[..., Result], num_threads: int, *arguments: object) -> list[Result]:
    """`[function(t, num_threads, *arguments) for t in range(num_threads)]`, all at once."""
    return run_each(function, [(thread, num_threads, *arguments) for thread in range(num_threads)])


def run_each(function: Callable[..., Result], arguments: Sequence[tuple[object, ...]]) -> list[Result]:
    """`[function(*a) for a in arguments]`, one thread each; raises the first error of a share once all have ended."""
    if len(arguments) == 1:
        return [function(*arguments[0])]
    shares = _Shares(function, arguments)
    _helpers.ask(shares, len(arguments) - 1)
    shares.work()
    return shares.wait()


def run_shares(driver: Callable[..., None], num_threads: int, num_shares: int, *arguments: object) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Statuses of `num_shares` shares of a function compiled by `jit_shares`, of which `driver` takes one after another."""
    tickets, statuses = np.zeros(NUM_TICKETS, np.int64), np.zeros(num_shares, np.int64)
    others = min(num_threads, num_shares) - 1
    if others <= 0 or not _patience.asks():
        driver(tickets, statuses, *arguments)
        return statuses
    began, worked = time.perf_counter(), time.thread_time()
    visit = _Visit(driver, (tickets, statuses, *arguments))
    _helpers.ask(visit, others)
    try:
        driver(tickets, statuses, *arguments)
    finally:
        visit.close()
    polls = 0
    while tickets[DONE] < num_shares:
        if visit.error is not None:
            raise visit.error
        # A helper that was begun with and then lost its core needs ours.
        polls += 1
        time.sleep(0 if polls < POLLS_BEFORE_SLEEP else SLEEP_S)
    took = time.perf_counter() - began
    _patience.learn(took, took - (time.thread_time() - worked))
    return statuses


class _Patience:
    """Whether to ask helpers at all: not for a while after one that had lost its core kept its caller waiting.

    On a machine with more threads than cores a helper may be stopped in the middle of a share, or with the interpreter's lock, for many
    times as long as the work takes: a caller is then faster alone. Each such wait doubles the number of calls that are made alone, up
    to a bound; each call that did not wait halves it.
    """

    def __init__(self) -> None:
        self._alone = self._next = 0

    def asks(self) -> bool:
        """Whether this call should ask."""
        if self._alone > 0:
            self._alone -= 1
            return False
        return True

    def learn(self, took_s: float, waited_s: float) -> None:
        """Tell how long a call with helpers took, and how much of it the caller did nothing."""
        if waited_s > LONG_WAIT_S and waited_s > took_s / 2:
            self._next = min(MOST_ALONE, max(FEWEST_ALONE, 2 * self._next))
            self._alone = self._next
        else:
            self._next //= 2


class _Shares(Generic[Result]):
    """Shares that threads take one at a time under the GIL."""

    def __init__(self, function: Callable[..., Result], arguments: Sequence[tuple[object, ...]]) -> None:
        self._function, self._arguments = function, arguments
        self._left = iter(range(len(arguments)))
        self._ended: SimpleQueue[tuple[int, Result | None, BaseException | None]] = SimpleQueue()

    def work(self) -> None:
        """Take shares until none is left."""
        for share in self._left:
            try:
                self._ended.put((share, self._function(*self._arguments[share]), None))
            except BaseException as error:  # noqa: BLE001 - it is raised where the work was asked for
                self._ended.put((share, None, error))

    def wait(self) -> list[Result]:
        """Results in the order of shares, when all have ended."""
        ended = sorted((self._ended.get() for _ in self._arguments), key=lambda share: share[0])
        for _, _, error in ended:
            if error is not None:
                raise error
        return [result for _, result, _ in ended]  # type: ignore[misc]  # without an error there is a result


class _Visit:
    """A helper's call of a driver; nothing once the caller has closed it."""

    def __init__(self, driver: Callable[..., None], arguments: tuple[object, ...]) -> None:
        self._driver = driver
        self._arguments: tuple[object, ...] | None = arguments
        self.error: BaseException | None = None

    def work(self) -> None:
        arguments = self._arguments
        if arguments is not None:
            try:
                self._driver(*arguments)
            except BaseException as error:  # noqa: BLE001 - it is raised where the work was asked for
                self.error = error

    def close(self) -> None:
        """Let go of the arrays: every share is taken."""
        self._arguments = None


class _Helpers:
    """Threads that work on what they are asked to, made when first needed. Without them the caller does all of it."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[_Shares[Any] | _Visit | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._left_core: int | None = None

    def ask(self, work: "_Shares[Any] | _Visit", count: int) -> None:
        """Let up to `count` helpers join in."""
        if not self._threads:
            self._start()
        self._leave_to_caller()
        for _ in range(count):
            self._asked.put(work)

    def _start(self) -> None:
        with self._lock:
            if not self._threads:
                count = max(1, (os.cpu_count() or 1) - 1)
                threads = [threading.Thread(target=self._serve, name=f"ninerank-kernel-{n}", daemon=True) for n in range(count)]
                for thread in threads:
                    thread.start()
                self._threads = threads

    def _leave_to_caller(self) -> None:
        """Keep helpers off the core that the caller is on.

        Linux likes to wake a thread where it was woken from, or where it last ran, and moves it to an idle core milliseconds later:
        the two then take turns on one core, which is no faster than one thread. With many helpers that is one of many, and telling
        them all would take longer than it saves.
        """
        core = _current_core() if len(self._threads) <= MOST_GUIDED else None
        if core is None or core == self._left_core:
            return
        self._left_core = core
        with suppress(OSError):  # a core may be taken from the process at any time
            others = os.sched_getaffinity(0) - {core}
            for thread in self._threads if others else ():
                if thread.native_id is not None:
                    os.sched_setaffinity(thread.native_id, others)

    def _serve(self) -> None:
        while (work := self._asked.get()) is not None:
            work.work()
            del work  # arrays are not kept while there is nothing to do

    def stop(self) -> None:
        """End the threads: compiled code must not run while the interpreter is taken down."""
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()


def _core_of_caller() -> Callable[[], int | None]:
    """A function that tells the core the calling thread is on; None where the system does not."""
    if not hasattr(os, "sched_setaffinity"):
        return lambda: None
    try:
        tell = ctypes.CDLL(None).sched_getcpu
    except (AttributeError, OSError):
        return lambda: None
    tell.argtypes, tell.restype = (), ctypes.c_int
    return lambda: core if (core := tell()) >= 0 else None


_current_core = _core_of_caller()
_helpers = _Helpers()
_patience = _Patience()


def _forget_helpers() -> None:
    """A forked child has none of its parent's threads."""
    global _helpers  # noqa: PLW0603 - one group of helpers a process
    _helpers = _Helpers()


def _stop_helpers() -> None:
    with suppress(RuntimeError):
        _helpers.stop()


atexit.register(_stop_helpers)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
