"""Until somebody says stop: SIGTERM or SIGINT."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["until_signal"]

log = logging.getLogger(__name__)


def until_signal(run: Callable[[threading.Event], None]) -> None:
    """Call `run` with an event that the first SIGTERM or SIGINT sets; a second one ends the process the hard way. From the main thread."""
    done = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def finish(number: int, frame: FrameType | None) -> None:
        log.info("signal %d: draining", number)
        restore()
        done.set()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, finish)
    try:
        run(done)
    finally:
        restore()


def wait(done: threading.Event) -> None:
    """Wait for `done`, however long; a wait without end would keep Python from running the signal handler on some platforms."""
    while not done.wait(1.0):
        pass
