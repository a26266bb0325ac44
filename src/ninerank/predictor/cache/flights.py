"""Each key is asked for once at a time: whoever comes second waits for the answer of the first."""

import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["Flight", "Flights"]

K = TypeVar("K")
V = TypeVar("V")


class Flight(Generic[K, V]):
    """One question about some keys that is under way."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._answers: dict[K, V] = {}

    def wait(self, timeout_s: float) -> dict[K, V]:
        """Answers by key once they are there; none of them after `timeout_s`."""
        return self._answers if self._done.wait(max(timeout_s, 0.0)) else {}


class Flights(Generic[K, V]):
    """Questions under way in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[K, Flight[K, V]] = {}

    def board(self, keys: Iterable[K]) -> tuple[list[K], Flight[K, V], dict[K, Flight[K, V]]]:
        """The keys that the caller has to ask for, the flight it then has to `land`, and those keys that others are asking for."""
        mine, flight, others = [], Flight[K, V](), {}
        with self._lock:
            for key in keys:
                other = self._of.setdefault(key, flight)
                if other is flight:
                    mine.append(key)
                else:
                    others[key] = other
        return mine, flight, others

    def land(self, keys: Iterable[K], flight: Flight[K, V], answers: dict[K, V]) -> None:
        """Hand the answers to whoever waits; keys without one are told so."""
        flight._answers = answers
        with self._lock:
            for key in keys:
                del self._of[key]
        flight._done.set()
