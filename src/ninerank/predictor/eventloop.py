"""The event loop of this process: one thread that every server of the process shares.

gRPC's asyncio side has one poller a process; loops of several threads would wake each other up for nothing.
"""

import asyncio
import atexit
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["event_loop", "on_loop"]

END_S = 5.0
T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def event_loop() -> asyncio.AbstractEventLoop:
    """The loop, started when it is first asked for."""
    global _loop  # noqa: PLW0603 - one a process is the point
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_loop.run_forever, name="event-loop", daemon=True)
            thread.start()
            # gRPC takes its files apart as the interpreter ends: the loop must not listen to them any more.
            atexit.register(_end, _loop, thread)
        return _loop


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(END_S)


def on_loop(work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
    """What `work` returns on the loop; called from any other thread."""
    return asyncio.run_coroutine_threadsafe(work, event_loop()).result(timeout_s)
