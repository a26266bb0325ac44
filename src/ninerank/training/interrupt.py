"""Ctrl-C and SIGTERM as a wish that the training loop meets at its next step, instead of an exception anywhere."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["Interrupts", "TrainingInterrupted"]


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop and did, after it had saved a checkpoint."""

    def __init__(self, signal_name: str, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal_name}; saved {checkpoint}")
        self.signal_name = signal_name
        self.checkpoint = checkpoint


class Interrupts:
    """Remembers the first SIGINT or SIGTERM; the second one stops the process at once.

    repeat_s: signals this soon after the first are the same one: what a terminal sends to all its processes, torchrun passes on to its own.
    """

    def __init__(self, repeat_s: float = 0.0) -> None:
        self.requested: str | None = None
        self._repeat_s = repeat_s
        self._first_s = 0.0

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is None:
            self._first_s = time.monotonic()
            self.requested = signal.Signals(number).name
        elif time.monotonic() - self._first_s > self._repeat_s:
            raise KeyboardInterrupt

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch signals inside the block; off the main thread, where Python delivers none, nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
