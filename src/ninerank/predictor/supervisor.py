"""Several server processes on one port, and whoever looks after them: a worker that dies is replaced while the others go on.

Each worker is a whole server with an interpreter of its own; the kernel shares connections out among them (SO_REUSEPORT). Tables are
mapped from the bundle's files, so that the processes share their memory.
"""

import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ninerank.errors import DeviceError, NinerankError
from ninerank.predictor.announcement import Announcement
from ninerank.predictor.control import Caller, error_of
from ninerank.predictor.host import ModelState
from ninerank.predictor.serveconfig import ServeConfig

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

START_S = 300.0
CALL_S = 5.0
MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 30.0
"""Between the end of a worker and its replacement; it doubles while replacements end before they answer."""


@dataclass
class _Worker:
    """One place: the process that holds it now. settled: it is ready, or never will be."""

    place: int
    process: "subprocess.Popen[str]"
    settled: threading.Event = field(default_factory=threading.Event)
    ready: Announcement | None = None
    failure: NinerankError | None = None
    caller: Caller | None = None


class Supervisor:
    """`config.processes` workers that serve a bundle; `start` waits until all answer, `stop` drains them."""

    def __init__(self, bundle_dir: str | Path, config: ServeConfig) -> None:
        self._bundle_dir = str(bundle_dir)
        self._config = config
        self._workers: dict[int, _Worker] = {}
        self._held_ports: list[socket.socket] = []
        self._is_ending = threading.Event()
        self._lock = threading.Lock()
        self.replaced = 0

    def start(self) -> Announcement:
        """Start the workers; raises DeviceError where the port cannot be had, and whatever keeps a worker from serving."""
        try:
            own = {"port": self._hold(self._config.port), "reuse_port": True, "metrics_port": None, "admin_port": None}
            if self._config.http_port is not None:
                own["http_port"] = self._hold(self._config.http_port)
            self._config = self._config.model_copy(update=own)
            places = list(range(self._config.processes))
            # The memory of feature caches is the first one's, which the others map: it is there before they start.
            for part in (places[:1], places[1:]) if self._config.has_caches else (places,):
                for place in part:
                    self._begin(place)
                for place in part:
                    worker = self._workers[place]
                    if not worker.settled.wait(START_S):
                        raise DeviceError(f"a worker process did not answer within {START_S:g} s")
                    if worker.failure is not None:
                        raise worker.failure
        except BaseException:
            self.stop(0)
            raise
        ready = self._workers[0].ready
        assert ready is not None
        return ready

    def pids(self) -> list[int]:
        """Processes that serve or are about to."""
        with self._lock:
            return [worker.process.pid for worker in self._workers.values()]

    def call(self, verb: str, *, timeout_s: float = CALL_S, **given: Any) -> dict[int, Any]:
        """What the workers say to `verb`, by place; raises a worker's error after all were asked. Workers that are gone are left out."""
        with self._lock:
            workers = [worker for worker in self._workers.values() if worker.ready is not None and worker.caller is not None]
        futures = {worker.place: worker.caller.call(verb, **given) for worker in workers if worker.caller is not None}
        answers, failures = {}, []
        due = time.monotonic() + timeout_s
        for place, future in futures.items():
            try:
                answers[place] = future.result(max(due - time.monotonic(), 0))
            except FutureTimeoutError:
                log.warning("a worker process did not answer %r within %g s", verb, timeout_s)
            except NinerankError as error:
                failures.append(error)
        told = [error for error in failures if type(error) is not NinerankError]
        if told:
            raise told[0]
        return answers

    def load(self, name: str, version: str) -> ModelState:
        """Have every worker load a model version; see ModelHost."""
        return self._change("load", name, version)

    def unload(self, name: str, version: str) -> ModelState:
        """Have every worker take a model version out of service; see ModelHost."""
        return self._change("unload", name, version)

    def _change(self, verb: str, name: str, version: str) -> ModelState:
        states = self.call(verb, timeout_s=START_S, name=name, version=version)
        if not states:
            raise NinerankError(f"no worker process answered {verb!r}")
        facts = next(iter(states.values()))
        return ModelState(**{**facts, "tasks": tuple(facts["tasks"])})

    def stop(self, grace_s: float | None = None) -> None:
        """End the workers: no new requests, those under way get `grace_s` (default: drain_s) seconds."""
        self._is_ending.set()
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            worker.process.terminate()
        due = time.monotonic() + (self._config.drain_s if grace_s is None else grace_s) + CALL_S
        for worker in workers:
            try:
                worker.process.wait(max(due - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                log.warning("worker process %d did not end in time", worker.process.pid)
                worker.process.kill()
                worker.process.wait()
            if worker.caller is not None:
                worker.caller.join(CALL_S)
        for held in self._held_ports:
            held.close()

    def _hold(self, port: int) -> int:
        holder, port = hold_port(self._config.host, port)
        self._held_ports.append(holder)
        return port

    def _begin(self, place: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "ninerank.predictor.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert process.stdin is not None
        assert process.stdout is not None
        worker = _Worker(place, process)
        with self._lock:
            shared = next((other.ready.shared for other in self._workers.values() if other.ready is not None), {})
        config = self._config.model_copy(update={"shared": dict(shared)})
        with contextlib.suppress(OSError):  # it is dead already: its output ends
            process.stdin.write(json.dumps({"bundle": self._bundle_dir, "config": config.model_dump(mode="json")}) + "\n")
            process.stdin.flush()
        with self._lock:
            self._workers[place] = worker
        worker.caller = Caller(process.stdin, process.stdout, self._events(worker))

    def _events(self, worker: _Worker) -> Callable[[Mapping[str, Any] | None], None]:
        def take(event: Mapping[str, Any] | None) -> None:
            if event is None:
                code = worker.process.wait()
                if worker.failure is None and worker.ready is None:
                    worker.failure = DeviceError(f"a worker process ended with code {code} before it answered")
                was_ready = worker.ready is not None
                worker.ready = None
                first = not worker.settled.is_set()
                worker.settled.set()
                if not self._is_ending.is_set() and not first:
                    self._replace(worker, code, was_ready)
            elif event["event"] == "ready":
                worker.ready = Announcement(**{key: value for key, value in event.items() if key != "event"})
                worker.settled.set()
            else:
                worker.failure = error_of(event)

        return take

    def _replace(self, worker: _Worker, code: int, was_ready: bool) -> None:
        """Runs on the thread that listened to the dead worker."""
        pause_s = MIN_PAUSE_S
        log.error("worker process %d ended with code %d, the others go on; it is replaced", worker.process.pid, code)
        while not self._is_ending.wait(pause_s):
            self._begin(worker.place)
            self.replaced += 1
            with self._lock:
                new = self._workers[worker.place]
            new.settled.wait(START_S)
            if new.ready is not None:
                return
            log.error("the replacement does not serve: %s", new.failure)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def hold_port(host: str, port: int) -> tuple[socket.socket, int]:
    """A socket that keeps `port` (0: a free one) for the workers, without listening; raises DeviceError where another listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            # Without SO_REUSEPORT: a port that other servers share would be shared with them unasked.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
            port = alone.getsockname()[1]
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, port))
    except OSError as error:
        raise DeviceError(f"cannot listen on {host}:{port}: it is in use or no address of this machine; port 0 takes a free one") from error
    return holder, port
