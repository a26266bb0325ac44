"""Several worker processes on one port: they share the calls, and one that is killed is replaced while the others go on."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ninerank.errors import BundleError, DeviceError, NinerankError
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.engine import Engine
from ninerank.predictor.host import NoAdminError
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.serving import _Workers
from ninerank.predictor.supervisor import Supervisor

USER = {"user_id": "u1", "age": 30.5, "hour": 7, "history": ["i1", "i2"]}
ITEMS: dict[str, Any] = {"item_id": ["i1", "i2"], "price": [1.5, 2.5], "tags": [["t1"], []], "city": ["rome", "oslo"]}


@pytest.fixture(scope="module")
def running(bundle_dir: Path) -> Iterator[tuple[Supervisor, str]]:
    supervisor = Supervisor(bundle_dir, ServeConfig(port=0, device="cpu", processes=2))
    ready = supervisor.start()
    yield supervisor, f"127.0.0.1:{ready.port}"
    supervisor.stop()


def answered(supervisor: Supervisor) -> dict[int, float]:
    """Requests that each worker answered."""
    totals = dict.fromkeys(range(2), 0.0)
    for family in _Workers(supervisor).collect():
        for sample in family.samples:
            if sample.name == "ninerank_requests_total" and sample.labels["status"] == "OK":
                totals[int(sample.labels["worker"])] = sample.value
    return totals


def test_workers_share_the_calls_and_give_the_bundle_s_scores(running: tuple[Supervisor, str], bundle_dir: Path) -> None:
    supervisor, target = running
    engine = Engine.load(bundle_dir, "cpu")
    before = answered(supervisor)
    with PredictorClient(target, connections=16, timeout_ms=60_000) as client:
        results = [client.rank(USER, ITEMS) for _ in range(32)]
    assert {result.model_version for result in results} == {engine.manifest.model_version}
    assert len({result.scores.tobytes() for result in results}) == 1
    after = answered(supervisor)
    assert all(after[place] > before[place] for place in after)  # 16 connections on one of two: one chance in 32,768
    assert sum(after.values()) - sum(before.values()) == 32


def test_a_worker_that_is_killed_is_replaced_while_calls_go_on(running: tuple[Supervisor, str]) -> None:
    supervisor, target = running
    with PredictorClient(target) as one:
        wanted = one.rank(USER, ITEMS).scores
    before, replaced = supervisor.pids(), supervisor.replaced
    done, outcomes = threading.Event(), list[Any]()

    def load() -> None:
        with PredictorClient(target, connections=4, timeout_ms=60_000) as client:
            while not done.is_set():
                try:
                    outcomes.append(np.array_equal(client.rank(USER, ITEMS).scores, wanted))
                except NinerankError as error:
                    outcomes.append(str(error))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(before[0], signal.SIGKILL)
    due = time.monotonic() + 120
    while supervisor.replaced == replaced or len(supervisor.call("queue")) < 2:
        assert time.monotonic() < due, "no replacement serves"
        time.sleep(0.1)
    during = len(outcomes)
    time.sleep(0.3)
    done.set()
    for thread in threads:
        thread.join(120)
    assert during > 0
    assert set(outcomes) == {True}  # the client asks again where a process went away
    after = supervisor.pids()
    assert after[1] == before[1]
    assert after[0] != before[0]


def test_a_worker_s_error_comes_through(running: tuple[Supervisor, str]) -> None:
    supervisor, _ = running
    with pytest.raises(NoAdminError, match="serves one bundle"):
        supervisor.call("load", name="small", version="8")
    assert [models[0]["version"] for models in supervisor.call("models").values()] == ["7", "7"]


def test_what_keeps_a_worker_from_serving_is_told(tmp_path: Path, running: tuple[Supervisor, str], bundle_dir: Path) -> None:
    with pytest.raises(BundleError, match="is no directory"):
        Supervisor(tmp_path / "nowhere", ServeConfig(port=0, device="cpu", processes=1)).start()
    port = int(running[1].rpartition(":")[2])
    with pytest.raises(DeviceError, match=f"cannot listen on 127.0.0.1:{port}"):
        Supervisor(bundle_dir, ServeConfig(port=port, device="cpu", processes=2)).start()


def test_the_end_leaves_no_process_and_no_port(running: tuple[Supervisor, str]) -> None:
    supervisor, target = running
    supervisor._is_ending.set()
    lonely = supervisor._workers[0]
    assert lonely.process.stdin is not None
    lonely.process.stdin.close()  # as if the supervisor were gone
    assert lonely.process.wait(60) == 0
    pids = supervisor.pids()
    supervisor.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were closed linger, a listener would not let us in
        again.bind(("127.0.0.1", int(target.rpartition(":")[2])))
