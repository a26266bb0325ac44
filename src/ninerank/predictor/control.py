"""Lines of JSON between a supervisor and a worker process, over the worker's standard input and output.

    supervisor -> worker   {"id": 7, "verb": "metrics", "with": {...}}
    worker -> supervisor   {"id": 7, "result": ...} or {"id": 7, "error": "BundleError", "message": "..."}
                           {"event": "ready", ...} once it answers, {"event": "failed", ...} if it never will

A worker whose input ends has lost its supervisor: it drains and ends.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import IO, Any, TypeAlias

from ninerank import errors
from ninerank.errors import NinerankError
from ninerank.predictor.host import NoAdminError, UnknownModelError

__all__ = ["Caller", "Verb", "answer_calls", "error_of", "event", "told"]

Verb: TypeAlias = Callable[[Mapping[str, Any]], Any]
_KINDS: dict[str, type[NinerankError]] = {kind.__name__: kind for kind in (NoAdminError, UnknownModelError)} | {
    name: getattr(errors, name) for name in errors.__all__ if name.endswith("Error")
}


def told(error: Exception) -> dict[str, str]:
    """An error as the other side can raise it again; a fault of our own keeps its class in the text."""
    if isinstance(error, NinerankError):
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "NinerankError", "message": f"{type(error).__name__}: {error}"}


def error_of(message: Mapping[str, Any]) -> NinerankError:
    """The error that `told` wrote."""
    return _KINDS.get(message["error"], NinerankError)(message["message"])


class Caller:
    """The supervisor's end: calls verbs of one worker, from any thread; `events` takes what the worker says unasked."""

    def __init__(self, to: IO[str], origin: IO[str], events: Callable[[Mapping[str, Any] | None], None]) -> None:
        """events: gets every event, and None when the worker's output ends."""
        self._to, self._origin, self._events = to, origin, events
        self._waiting: dict[int, Future[Any]] = {}
        self._next_id = 0
        self._is_over = False
        self._lock = threading.Lock()
        self._listener = threading.Thread(target=self._listen, name="worker-output", daemon=True)
        self._listener.start()

    def call(self, verb: str, **given: Any) -> "Future[Any]":
        """What the worker's verb returns; its future raises the worker's NinerankError, or one that says that the worker is gone."""
        future: Future[Any] = Future()
        with self._lock:
            if self._is_over:
                future.set_exception(_gone())
                return future
            self._next_id += 1
            self._waiting[self._next_id] = future
            try:
                self._to.write(json.dumps({"id": self._next_id, "verb": verb, "with": given}) + "\n")
                self._to.flush()
            except (OSError, ValueError):
                del self._waiting[self._next_id]
                future.set_exception(_gone())
        return future

    def _listen(self) -> None:
        for line in self._origin:
            message = json.loads(line)
            if "event" in message:
                self._events(message)
                continue
            with self._lock:
                future = self._waiting.pop(message["id"])
            if "error" in message:
                future.set_exception(error_of(message))
            else:
                future.set_result(message["result"])
        with self._lock:
            self._is_over = True
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(_gone())
        with contextlib.suppress(OSError):  # what could not be written is lost with the worker
            self._to.close()
        self._origin.close()
        self._events(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the worker's output has ended and `events` was told."""
        self._listener.join(timeout_s)


def _gone() -> NinerankError:
    return NinerankError("the worker process is gone")


def answer_calls(origin: IO[str], to: IO[str], verbs: Mapping[str, Verb]) -> None:
    """The worker's end: answer calls one after another until the input ends."""
    for line in origin:
        message = json.loads(line)
        try:
            reply: dict[str, Any] = {"result": verbs[message["verb"]](message["with"])}
        except Exception as error:  # noqa: BLE001 - the supervisor is told, the worker serves on
            reply = told(error)
        _write(to, {"id": message["id"], **reply})


def event(to: IO[str], name: str, **told_of: Any) -> None:
    """Tell the supervisor something unasked."""
    _write(to, {"event": name, **told_of})


def _write(to: IO[str], message: Mapping[str, Any]) -> None:
    to.write(json.dumps(message) + "\n")
    to.flush()
