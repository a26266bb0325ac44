"""One of several server processes on one port: `python -m ninerank.predictor.worker`, started by the supervisor alone.

The first line of standard input is {"bundle": ..., "config": {...}}; what follows, and what goes out, is `control`'s.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import IO, Any

from prometheus_client import generate_latest

from ninerank.predictor.control import Verb, answer_calls, event, told
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer

__all__ = ["main", "verbs"]


def verbs(server: PredictorServer) -> dict[str, Verb]:
    """What the supervisor may ask of a worker."""

    def models(given: Mapping[str, Any]) -> Any:
        return [asdict(state) for state in server.host.models()]

    def load(given: Mapping[str, Any]) -> Any:
        return asdict(server.host.load(given["name"], given["version"]))

    def unload(given: Mapping[str, Any]) -> Any:
        return asdict(server.host.unload(given["name"], given["version"]))

    def metrics(given: Mapping[str, Any]) -> Any:
        return generate_latest(server.telemetry.registry).decode()

    def queue(given: Mapping[str, Any]) -> Any:
        return asdict(server.queue.stats())

    return {"models": models, "load": load, "unload": unload, "metrics": metrics, "queue": queue}


def main() -> int:
    """Serve until standard input ends or SIGTERM comes."""
    form = f"%(asctime)s %(levelname)s worker {os.getpid()} %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)
    # Ctrl-C at a terminal reaches every process of the group; when a worker ends is the supervisor's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    to = _own_output()
    given = json.loads(sys.stdin.readline())
    try:
        server = PredictorServer(given["bundle"], ServeConfig.parse(given["config"], "worker"))
        ready = server.start()
    except Exception as error:  # noqa: BLE001 - the supervisor tells whoever started it
        event(to, "failed", **told(error))
        return 1
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    event(to, "ready", **asdict(ready))
    threading.Thread(target=_answer, args=(to, verbs(server), ended), name="control", daemon=True).start()
    while not ended.wait(1.0):
        pass
    server.stop()
    return 0


def _answer(to: IO[str], known: Mapping[str, Verb], ended: threading.Event) -> None:
    try:
        answer_calls(sys.stdin, to, known)
    except OSError:
        logging.getLogger(__name__).warning("the supervisor is gone")
    ended.set()


def _own_output() -> IO[str]:
    """Standard output for control alone: whatever prints goes to standard error from here on."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    sys.exit(main())
