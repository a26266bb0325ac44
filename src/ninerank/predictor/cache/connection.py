"""Connections to Redis whose every exchange ends by a deadline, however slowly the bytes come; the one module that imports redis.

redis-py connects, authenticates, selects and encrypts. What it lacks is a bound on the whole of an answer: its timeout is per packet, and
a server that sends a byte now and then holds a caller for ever. So commands and replies go over its socket directly, parsed by hiredis.
"""

import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from ninerank.errors import DataError
from ninerank.predictor.cache.endpoint import RedisEndpoint

__all__ = ["ConnectionPool", "ReplyError", "StoreError", "Wire"]

READ_BYTES = 1 << 17
MAX_IDLE = 64


class StoreError(Exception):
    """The store did not answer, or answered something that cannot be used."""


class ReplyError(StoreError):
    """The store answered with an error; the connection is good."""


class Wire:
    """One connection; used by one thread at a time. Raises StoreError, after which it is of no use."""

    def __init__(self, endpoint: RedisEndpoint, host: str, port: int, connect_timeout_s: float, *, plain: bool = False) -> None:
        import hiredis
        from redis.backoff import NoBackoff
        from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.exceptions import RedisError
        from redis.retry import Retry

        options: dict[str, Any] = {
            "socket_timeout": connect_timeout_s,
            "socket_connect_timeout": connect_timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "db": 0 if plain else endpoint.db,
        }
        if not plain and (endpoint.username or endpoint.password):
            options |= {"username": endpoint.username or None, "password": endpoint.password}
        kind: Any = SSLConnection if endpoint.tls else Connection if port else UnixDomainSocketConnection
        options |= {"host": host, "port": port} if port else {"path": host}
        if endpoint.tls and endpoint.tls_ca:
            options["ssl_ca_certs"] = endpoint.tls_ca
        connection = kind(**options)
        # Names of libraries, which redis-py tells the server, would be two round trips more.
        connection.lib_name = connection.lib_version = connection.driver_info = None
        try:
            connection.connect()
        except (RedisError, OSError) as error:
            raise StoreError(f"{host}:{port}: {error}") from None
        self._connection, self._name = connection, f"{host}:{port}"
        self._socket: socket.socket = connection._sock
        self._reader: Any = hiredis.Reader()
        self._buffer = bytearray(READ_BYTES)
        self._pack: Any = hiredis.pack_command
        self._reply_error, self._protocol_error = hiredis.ReplyError, hiredis.ProtocolError

    def send(self, commands: Sequence[tuple[bytes | str | int, ...]], deadline_ns: int) -> None:
        """Send commands, none of whose answers is waited for here."""
        try:
            self._socket.settimeout(_left_s(deadline_ns))
            self._socket.sendall(b"".join([self._pack(command) for command in commands]))
        except OSError as error:
            raise StoreError(f"{self._name}: {error}") from None

    def receive(self, deadline_ns: int) -> Any:
        """The next answer; raises ReplyError where it is an error."""
        try:
            while True:
                reply = self._reader.gets()
                if reply is not False:
                    break
                # What is there already is taken even when the time is up: another node, read before, may have used it all.
                self._socket.settimeout(max((deadline_ns - time.perf_counter_ns()) / 1e9, 0.0))
                count = self._socket.recv_into(self._buffer)
                if not count:
                    raise StoreError(f"{self._name}: closed the connection")
                self._reader.feed(self._buffer, 0, count)
        except OSError as error:
            raise StoreError(f"{self._name}: {error}") from None
        except self._protocol_error as error:
            raise StoreError(f"{self._name}: sent what is no Redis answer ({error})") from None
        if isinstance(reply, self._reply_error):
            raise ReplyError(f"{self._name}: {reply}")
        return reply

    def is_up(self) -> bool:
        """Whether an idle connection can be used: nothing is to be read on it, neither its end nor what nobody asked for."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return not poller.poll(0)

    def call(self, *command: bytes | str | int, timeout_s: float) -> Any:
        """One command and its answer."""
        deadline_ns = time.perf_counter_ns() + int(timeout_s * 1e9)
        self.send([command], deadline_ns)
        return self.receive(deadline_ns)

    def close(self) -> None:
        """Let the connection go."""
        self._connection.disconnect()


class ConnectionPool:
    """Idle connections to one server; one that failed is not put back."""

    def __init__(self, endpoint: RedisEndpoint, host: str, port: int) -> None:
        self._endpoint, self.host, self.port = endpoint, host, port
        self._idle: list[Wire] = []
        self._lock = threading.Lock()
        self._is_closed = False
        self.connects = 0
        """Connections made since the start."""

    def take(self, deadline_ns: int | None = None) -> Wire:
        """An idle connection that is still up, or a new one. Raises StoreError."""
        while True:
            with self._lock:
                if not self._idle:
                    self.connects += 1
                    break
                wire = self._idle.pop()
            if wire.is_up():
                return wire
            wire.close()
        limit_s = self._endpoint.connect_timeout_ms / 1e3
        if deadline_ns is not None:
            limit_s = min(limit_s, (deadline_ns - time.perf_counter_ns()) / 1e9)
        if limit_s <= 0:
            raise StoreError(f"{self.host}:{self.port}: no time left to connect")
        try:
            return Wire(self._endpoint, self.host, self.port, limit_s)
        except ModuleNotFoundError as error:
            raise DataError(f"{error.name} is not installed; this brings it: pip install 'ninerank[serve]'") from None

    def give(self, wire: Wire) -> None:
        """Take back a connection that is at rest."""
        with self._lock:
            if len(self._idle) < MAX_IDLE and not self._is_closed:
                self._idle.append(wire)
                return
        wire.close()

    def drop_idle(self) -> None:
        """Close idle connections: the server they led to is gone."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        self._is_closed = True
        self.drop_idle()


def _left_s(deadline_ns: int) -> float:
    left_s = (deadline_ns - time.perf_counter_ns()) / 1e9
    if left_s <= 0:
        raise TimeoutError("no answer in time")
    return left_s
