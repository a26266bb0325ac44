"""Work ahead on a background thread: order kept, errors passed on, the thread ended with its user."""

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Prefetch"]

T = TypeVar("T")
POLL_S = 0.1


class Prefetch(Generic[T]):
    """Iterator over `source`, up to `depth` items ahead; depth 0 iterates on the caller's thread.

    An exception of the source is raised at the place in the order where it happened. Leaving the `with` block stops the thread,
    whether the source is finished or not.

    >>> with Prefetch(range(4), depth=2) as items:
    ...     list(items)
    [0, 1, 2, 3]
    """

    def __init__(self, source: Iterable[T], depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="ninerank-prefetch", daemon=True) if depth else None

    def __enter__(self) -> Iterator[T]:
        if self._thread is None:
            return iter(self._source)
        self._thread.start()
        return self._consume()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _produce(self) -> None:
        try:
            for item in self._source:
                if not self._put(("item", item)):
                    break
            else:
                self._put(("end", None))
        except BaseException as error:  # noqa: BLE001 - raised again on the consumer's thread
            self._put(("error", error))
        finally:
            close = getattr(self._source, "close", None)
            if callable(close):
                close()

    def _put(self, entry: tuple[str, T | BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def _consume(self) -> Iterator[T]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if isinstance(value, BaseException) and kind == "error":
                raise value
            yield value  # type: ignore[misc]
