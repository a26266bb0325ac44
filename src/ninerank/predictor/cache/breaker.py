"""A circuit breaker: after some failures in a row nobody waits for the store; a probe beside the requests finds out when it is back.

closed -- failures in a row --> open -- pause --> half-open: one probe -- good --> closed
                                  ^------------------------------------ bad (longer pause)
"""

import random
import threading
import time
from collections.abc import Callable

__all__ = ["CLOSED", "HALF_OPEN", "OPEN", "Breaker"]

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


class Breaker:
    """Of one node. failures: in a row, until it opens. pause_s: before the first probe; doubles up to max_pause_s, with jitter.

    clock: seconds, monotonic; tests bring their own.
    """

    def __init__(
        self, *, failures: int = 5, pause_s: float = 0.1, max_pause_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit, self._first_pause_s, self._max_pause_s, self._clock = failures, pause_s, max_pause_s, clock
        self._lock = threading.Lock()
        self._state, self._in_row, self._pause_s, self._probe_at = CLOSED, 0, pause_s, 0.0
        self.opened = self.probes = 0
        """Times it opened, and probes sent, since the start."""

    @property
    def state(self) -> str:
        """closed, open or half-open."""
        return self._state

    def allows(self) -> bool:
        """Whether a request may ask."""
        return self._state == CLOSED

    def success(self) -> None:
        """A request, or the probe, was answered."""
        if self._state == CLOSED and not self._in_row:
            return
        with self._lock:
            # An answer that was on its way when it opened says nothing of now: the probe decides.
            if self._state != OPEN:
                self._state, self._in_row, self._pause_s = CLOSED, 0, self._first_pause_s

    def failure(self) -> None:
        """A request, or the probe, failed."""
        with self._lock:
            self._in_row += 1
            if self._state == HALF_OPEN:
                self._pause_s = min(2 * self._pause_s, self._max_pause_s)
                self._open()
            elif self._state == CLOSED and self._in_row >= self._limit:
                self.opened += 1
                self._open()

    def trip(self) -> None:
        """Open at once: the store is known to be away."""
        with self._lock:
            if self._state == CLOSED:
                self.opened += 1
                self._open()

    def probe_due(self) -> bool:
        """Whether the caller, and nobody else, is to probe now; it then says `success` or `failure`."""
        with self._lock:
            if self._state != OPEN or self._clock() < self._probe_at:
                return False
            self._state = HALF_OPEN
            self.probes += 1
            return True

    def _open(self) -> None:
        self._state = OPEN
        self._probe_at = self._clock() + self._pause_s * random.uniform(0.75, 1.25)
