"""The store on Redis: one MGET a node and request, bounded in time, behind a circuit breaker a node.

Nothing is tried twice in a request's way. What fails is told as failed; a thread beside the requests probes nodes whose breaker is
open and follows sentinels and clusters as they change.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ninerank.predictor.cache.breaker import CLOSED, Breaker
from ninerank.predictor.cache.connection import ConnectionPool, ReplyError, StoreError, Wire
from ninerank.predictor.cache.endpoint import RedisEndpoint
from ninerank.predictor.cache.keys import Keys
from ninerank.predictor.cache.lookup import StoreReply
from ninerank.predictor.cache.topology import Address, locate

__all__ = ["NodeStats", "RedisStore"]

log = logging.getLogger(__name__)

IDLE_S, BUSY_S = 1.0, 0.02
START_S = 0.25
REFRESH_S, REFRESH_SOON_S = 2.0, 0.1
MOVED = ("MOVED", "ASK", "TRYAGAIN")


@dataclass(frozen=True)
class NodeStats:
    """Counters of one node since the start. emptied: answers in which all that had been loaded was gone."""

    address: str
    state: str
    requests: int
    failures: int
    emptied: int
    opened: int
    probes: int
    connects: int


class _Node:
    def __init__(self, endpoint: RedisEndpoint, address: Address) -> None:
        self.address, self.pool, self.breaker = address, ConnectionPool(endpoint, *address), Breaker()
        self.requests = self.failures = self.emptied = 0
        self.is_loaded = False

    def stats(self) -> NodeStats:
        host, port = self.address
        name = f"{host}:{port}" if port else host
        breaker = self.breaker
        return NodeStats(
            name, breaker.state, self.requests, self.failures, self.emptied, breaker.opened, breaker.probes, self.pool.connects
        )


@dataclass
class _Exchange:
    """What one node is asked in one request. parts: positions of keys, one MGET each."""

    node: _Node
    parts: list[list[int]] = field(default_factory=list)
    wire: Wire | None = None


class RedisStore:
    """Packed values of one kind of entity (`item` or `user`) in a Redis.

    A loader leaves a mark beside the values: where it was and is gone, the server was emptied, and what it does not have counts as failed.
    """

    def __init__(self, endpoint: RedisEndpoint, kind: str) -> None:
        self.endpoint, self.keys = endpoint, Keys(endpoint, kind)
        self.timeout_s = (endpoint.timeout_ms + endpoint.connect_timeout_ms) / 1e3
        self._nodes: dict[Address, _Node] = {}
        self._of_tag: list[_Node] = []
        self._lock = threading.Lock()
        self._wake, self._is_closed = threading.Event(), False
        self._refresh_at, self._is_lost = 0.0, False
        self._refresh()
        for node in self._nodes.values():
            if not self._greet(node, START_S):
                node.breaker.trip()
        self._thread = threading.Thread(target=self._attend, name=f"redis-{kind}", daemon=True)
        self._thread.start()

    def get(self, keys: Sequence[bytes], deadline_ns: int) -> StoreReply:
        """See Store."""
        values: list[bytes | None] = [None] * len(keys)
        failed = [True] * len(keys)
        names = [self.keys.of(key) for key in keys]
        exchanges = self._split(keys)
        for exchange in exchanges:
            self._send(exchange, names, deadline_ns)
        end_ns = min(deadline_ns, time.perf_counter_ns() + int(self.endpoint.timeout_ms * 1e6))
        for exchange in exchanges:
            if exchange.wire is not None:
                self._receive(exchange, exchange.wire, values, failed, end_ns)
        return StoreReply(values, failed if any(failed) else None)

    def state(self) -> str:
        """up; down where no node's breaker is closed; part where some are not."""
        if not self._of_tag:
            return "down"
        up = [node.breaker.state == CLOSED for node in set(self._of_tag)]
        return "up" if all(up) else "part" if any(up) else "down"

    def nodes(self) -> list[NodeStats]:
        """Counters of every node that is or was asked."""
        return [node.stats() for node in list(self._nodes.values())]

    def close(self) -> None:
        """Stop attending and close connections."""
        self._is_closed = True
        self._wake.set()
        self._thread.join()
        for node in self._nodes.values():
            node.pool.close()

    def _split(self, keys: Sequence[bytes]) -> list[_Exchange]:
        """Who is asked for which keys; keys whose node is unknown or out of order are left out."""
        of_tag = self._of_tag
        if not of_tag:
            return []
        if self.endpoint.kind != "cluster":
            return [_Exchange(of_tag[0], [list(range(len(keys)))])] if of_tag[0].breaker.allows() else []
        exchanges: dict[Address, _Exchange] = {}
        parts: dict[int, list[int]] = {}
        for position, key in enumerate(keys):
            tag = self.keys.tag(key)
            part = parts.get(tag)
            if part is None:
                part = parts[tag] = []
                node = of_tag[tag]
                if node.breaker.allows():
                    exchanges.setdefault(node.address, _Exchange(node)).parts.append(part)
            part.append(position)
        return list(exchanges.values())

    def _send(self, exchange: _Exchange, names: list[bytes], deadline_ns: int) -> None:
        node = exchange.node
        node.requests += 1
        commands: list[tuple[bytes, ...]] = [(b"MGET", *[names[position] for position in part]) for part in exchange.parts]
        commands[0] += (self.keys.mark_beside(names[exchange.parts[0][0]]),)
        wire = None
        try:
            wire = node.pool.take(deadline_ns)
            wire.send(commands, min(deadline_ns, time.perf_counter_ns() + int(self.endpoint.timeout_ms * 1e6)))
        except (StoreError, TimeoutError) as error:
            self._fail(node, wire, error)
        else:
            exchange.wire = wire

    def _receive(self, exchange: _Exchange, wire: Wire, values: list[bytes | None], failed: list[bool], end_ns: int) -> None:
        node, is_good, refused = exchange.node, True, None
        try:
            for index, part in enumerate(exchange.parts):
                try:
                    reply = wire.receive(end_ns)
                except ReplyError as error:
                    refused, is_good = error, is_good and any(word in str(error) for word in MOVED)
                    continue
                if not isinstance(reply, list) or len(reply) != len(part) + (index == 0):
                    raise StoreError(f"{node.address}: answered MGET with something else")
                if index == 0:
                    self._look_at_mark(node, reply.pop() is not None)
                is_emptied = node.emptied > 0 and not node.is_loaded
                for position, value in zip(part, reply, strict=True):
                    values[position], failed[position] = value, value is None and is_emptied
        except StoreError as error:
            self._fail(node, wire, error)
            return
        if refused is not None:
            self._refresh_soon()
        if refused is not None and not is_good:
            self._fail(node, wire, refused)
            return
        node.pool.give(wire)
        node.breaker.success()

    def _look_at_mark(self, node: _Node, is_there: bool) -> None:
        if is_there:
            node.is_loaded = True
        elif node.is_loaded or node.emptied:
            if node.is_loaded:
                log.warning("features at %s:%d: what was loaded is gone", *node.address)
            node.is_loaded = False
            node.emptied += 1

    def _fail(self, node: _Node, wire: Wire | None, error: Exception) -> None:
        if wire is not None:
            wire.close()
        node.failures += 1
        opened = node.breaker.opened
        node.breaker.failure()
        if node.breaker.opened > opened:
            log.warning("features at %s:%d: not asked any more until a probe succeeds (%s)", *node.address, error)
        self._refresh_soon()
        self._wake.set()

    def _refresh_soon(self) -> None:
        self._refresh_at = min(self._refresh_at, time.monotonic() + REFRESH_SOON_S)
        self._wake.set()

    def _attend(self) -> None:
        is_fixed = self.endpoint.kind == "standalone"
        while not self._is_closed:
            is_busy = any(node.breaker.state != CLOSED for node in self._nodes.values()) or not self._of_tag
            self._wake.wait(BUSY_S if is_busy else IDLE_S if is_fixed else max(0.0, min(IDLE_S, self._refresh_at - time.monotonic())))
            self._wake.clear()
            try:
                if not is_fixed and time.monotonic() >= self._refresh_at:
                    self._refresh()
                for node in list(self._nodes.values()):
                    if node.breaker.probe_due():
                        self._probe(node)
            except Exception:  # whatever it is, the thread that finds the way back must not end
                log.exception("features at %s: the thread that attends to it goes on", self.endpoint.shown)
                time.sleep(BUSY_S)

    def _probe(self, node: _Node) -> None:
        """Ask a node whose breaker is open, with the time that a request would have."""
        node.pool.drop_idle()
        if self._greet(node, self.endpoint.timeout_ms / 1e3):
            node.breaker.success()
            log.info("features at %s:%d: asked again", *node.address)
        else:
            node.breaker.failure()

    def _greet(self, node: _Node, timeout_s: float) -> bool:
        """Ask as a request would on a new connection, which is kept; whether it answered."""
        wire = None
        try:
            wire = node.pool.take()
            wire.call(b"MGET", self.keys.mark(0), timeout_s=timeout_s)
        except ReplyError as error:
            if not any(word in str(error) for word in MOVED):
                wire = self._close(wire)
        except (StoreError, TimeoutError) as error:
            log.debug("features at %s:%d: %s", *node.address, error)
            wire = self._close(wire)
        if wire is not None:
            node.pool.give(wire)
        return wire is not None

    @staticmethod
    def _close(wire: Wire | None) -> None:
        if wire is not None:
            wire.close()

    def _refresh(self) -> None:
        """Find out which node holds which tag; without an answer everything stays."""
        self._refresh_at = time.monotonic() + REFRESH_S
        addresses = locate(self.endpoint, [*self._nodes], self.keys.slots)
        if addresses is None:
            if not self._is_lost:
                log.warning("features at %s: nobody says where they are", self.endpoint.shown)
            self._is_lost = True
            return
        self._is_lost = False
        with self._lock:
            for address in addresses:
                if address not in self._nodes:
                    self._nodes[address] = _Node(self.endpoint, address)
            if [node.address for node in self._of_tag] != addresses:
                log.info("features at %s: %s", self.endpoint.shown, ", ".join(sorted({f"{host}:{port}" for host, port in addresses})))
                self._of_tag = [self._nodes[address] for address in addresses]
            gone = [address for address in self._nodes if address not in addresses]
            for address in gone:
                self._nodes.pop(address).pool.close()
