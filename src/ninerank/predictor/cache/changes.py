"""The stream by which servers hear that features changed: `prefix:item!changes`, entries of fields `id` (any number), or `all`.

Whoever writes values may tell it: XADD ninerank:item!changes MAXLEN ~ 100000 * id 17 id 42. What a server hears is past its time in its
memory from then on, and asked for anew.
"""

import contextlib
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from ninerank.errors import RequestError
from ninerank.predictor.cache.connection import StoreError, Wire
from ninerank.predictor.cache.endpoint import RedisEndpoint
from ninerank.predictor.cache.keys import Keys, slot_of
from ninerank.predictor.cache.lookup import FeatureCache
from ninerank.predictor.cache.topology import locate

__all__ = ["ChangeFollower", "announce", "announce_all"]

log = logging.getLogger(__name__)

MAX_ENTRIES = 100_000
BLOCK_MS = 500
READ_ENTRIES = 1_000
AGAIN_S = 0.5
ANSWER_S = 2.0
START = b"0-0"


def announce(client: Any, keys: Keys, ids: Iterable[str]) -> None:
    """Say that values of `ids` changed."""
    words: list[str | bytes] = [word for entity in ids for word in ("id", entity)]
    if words:
        client.execute_command("XADD", keys.changes, "MAXLEN", "~", MAX_ENTRIES, "*", *words)


def announce_all(client: Any, keys: Keys) -> None:
    """Say that every value may have changed."""
    client.execute_command("XADD", keys.changes, "MAXLEN", "~", MAX_ENTRIES, "*", "all", "1")


class ChangeFollower:
    """A thread that takes what the stream tells out of a cache; where it missed entries, everything counts as changed."""

    def __init__(self, cache: FeatureCache, endpoint: RedisEndpoint, kind: str) -> None:
        self._cache, self._endpoint, self._keys = cache, endpoint, Keys(endpoint, kind)
        self._is_closed = threading.Event()
        self._last = b""
        self.entries = 0
        """Heard since the start."""
        self._thread = threading.Thread(target=self._follow, name=f"changes-{kind}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._is_closed.set()
        self._thread.join(10)

    def _follow(self) -> None:
        wire: Wire | None = None
        while not self._is_closed.is_set():
            try:
                if wire is None:
                    wire = self._connect()
                    self._resume(wire)
                command = ("XREAD", "COUNT", READ_ENTRIES, "BLOCK", BLOCK_MS, "STREAMS", self._keys.changes, self._last)
                for _, entries in wire.call(*command, timeout_s=BLOCK_MS / 1e3 + ANSWER_S) or ():
                    self._take(entries)
            except (StoreError, TimeoutError) as error:
                log.debug("changes at %s: %s", self._endpoint.shown, error)
                wire = self._drop(wire)
                self._is_closed.wait(AGAIN_S)
            except Exception:  # whatever the stream holds, the thread that hears what comes next must not end
                log.exception("changes at %s: what was told cannot be read; everything counts as changed", self._endpoint.shown)
                self._cache.invalidate_all()
                wire, self._last = self._drop(wire), b""
                self._is_closed.wait(AGAIN_S)
        self._drop(wire)

    def _connect(self) -> Wire:
        found = locate(self._endpoint, (), [slot_of(self._keys.changes)])
        if found is None:
            raise StoreError("nobody says where it is")
        return Wire(self._endpoint, *found[0], ANSWER_S)

    @staticmethod
    def _drop(wire: Wire | None) -> None:
        if wire is not None:
            wire.close()

    def _resume(self, wire: Wire) -> None:
        """Go on after the last entry heard; where the stream was trimmed or replaced meanwhile, everything counts as changed."""
        first = wire.call("XRANGE", self._keys.changes, "-", "+", "COUNT", 1, timeout_s=ANSWER_S)
        last = wire.call("XREVRANGE", self._keys.changes, "+", "-", "COUNT", 1, timeout_s=ANSWER_S)
        newest = last[0][0] if last else START
        missed = _order(newest) < _order(self._last or START)
        if first and self._last not in {b"", START}:
            missed |= _order(first[0][0]) > _order(self._last)
        if missed:
            self._cache.invalidate_all()
            self._last = b""
        self._last = self._last or newest

    def _take(self, entries: Sequence[Any]) -> None:
        ids: list[str] = []
        for entry, words in entries:
            self._last = entry
            self.entries += 1
            for name, value in zip(words[::2], words[1::2], strict=False):
                if name == b"all":
                    self._cache.invalidate_all()
                elif name == b"id":
                    ids.append(value.decode("utf-8", "replace"))
        if ids:
            with contextlib.suppress(RequestError):  # ids of another type than the key's are nobody's
                self._cache.invalidate(pa.array(ids))


def _order(entry: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds), int(number)
