"""Saving in the background: what is saved is what was there at the call, and no error is swallowed."""

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ninerank.errors import CheckpointError
from ninerank.training.checkpoint import CheckpointStore, tensorfile

WAIT_S = 60


class Gate:
    """Holds the writer back before its file is flushed, or has it fail there."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.error: OSError | None = None
        self.open.set()
        self.fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.reached.set()
        assert self.open.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        self.fsync(descriptor)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()

    class Os:
        fsync = staticmethod(gate)

    monkeypatch.setattr(tensorfile, "os", Os)
    yield gate
    gate.open.set()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1, spec_digest="d", asynchronous=True)
    yield store
    store.wait()


def tree(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((300, 40), value)}}


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_training_goes_on_while_it_is_written(store, gate):
    held = tree(1.0)
    gate.open.clear()
    assert store.save(5, held, {"step": 5}) == store.directory / "step-5"
    assert gate.reached.wait(WAIT_S)
    held["model"]["w"].fill_(-1.0)
    store.check()
    assert store.names() == []
    gate.open.set()
    checkpoint = store.load()  # waits for it
    assert (checkpoint.name, checkpoint.state) == ("step-5", {"step": 5})
    assert torch.equal(checkpoint.section("model")["w"], torch.ones(300, 40))


def test_the_next_save_waits_for_the_one_before(store, gate):
    gate.open.clear()
    store.save(5, tree(5.0), {})
    gate.reached.wait(WAIT_S)
    opener = threading.Timer(0.2, gate.open.set)
    opener.start()
    store.save(6, tree(6.0), {})
    assert gate.open.is_set()
    assert store.names()[0] == "step-5"
    store.wait()
    assert store.names() == ["step-6"]
    opener.join()


def test_the_one_before_stays_until_the_new_one_is_whole(store, gate):
    store.save(5, tree(5.0), {})
    store.wait()
    gate.reached.clear()
    gate.open.clear()
    store.save(6, tree(6.0), {})
    gate.reached.wait(WAIT_S)
    assert store.names() == ["step-5"]
    gate.open.set()
    store.wait()
    assert [path.name for path in store.directory.iterdir()] == ["step-6"]


@pytest.mark.parametrize("call", ["check", "wait", "load", "save", "leave"])
def test_an_error_of_the_background_is_raised_by_whatever_comes_next(store, gate, call):
    with store:
        store.save(5, tree(5.0), {})
    gate.error = full()
    store.save(6, tree(6.0), {})
    gate.reached.wait(WAIT_S)
    if call == "check":
        store._writing._future.exception(timeout=WAIT_S)
    calls = {
        "check": store.check,
        "wait": store.wait,
        "load": store.load,
        "save": lambda: store.save(7, tree(7.0), {}),
        "leave": lambda: store.__exit__(None, None, None),
    }
    message = r"step-6: cannot be written by process 0: \[Errno 28\] No space left on device; the newest one that was saved is step-5"
    with pytest.raises(CheckpointError, match=message):
        calls[call]()
    gate.error = None
    assert [path.name for path in store.directory.iterdir()] == ["step-5"]
    store.wait()  # told once
    assert store.load().name == "step-5"
    store.save(7, tree(7.0), {})
    assert store.load().name == "step-7"


def test_the_error_that_ends_a_run_is_not_hidden_by_a_second_one(store, gate, caplog):
    gate.error = full()
    with pytest.raises(KeyError, match="the first"), caplog.at_level(logging.ERROR), store:  # noqa: PT012
        store.save(6, tree(6.0), {})
        raise KeyError("the first")
    assert "step-6: cannot be written" in caplog.text
    assert "no checkpoint was saved yet" in caplog.text


def test_a_full_disk_without_background(tmp_path, gate):
    store = CheckpointStore(tmp_path, keep_last=2, spec_digest="d")
    store.save(5, tree(5.0), {})
    gate.error = full()
    with pytest.raises(CheckpointError, match=r"step-6: cannot be written by process 0: .*No space left.*step-5"):
        store.save(6, tree(6.0), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_a_mistake_in_the_tree_is_raised_as_it_is(store):
    with pytest.raises(TypeError, match=r"model\.w: str has no place"):
        store.save(5, {"model": {"w": "text"}}, {})
    store.save(5, {"model": {"w": torch.ones(1, dtype=torch.complex64)}}, {})
    with pytest.raises(TypeError, match="cannot hold"):
        store.wait()
    assert list(store.directory.iterdir()) == []


PROGRAM = """
import sys, time, torch
from pathlib import Path
from ninerank.training.checkpoint import CheckpointStore, tensorfile
inner = tensorfile.write_tensors.__globals__["os"].fsync
store = CheckpointStore(Path(sys.argv[1]), keep_last=1, spec_digest="d", asynchronous=True)
class Slow:
    fsync = staticmethod(lambda descriptor: (time.sleep(1.0), inner(descriptor)))
tensorfile.os = Slow
store.save(5, {"model": {"w": torch.ones(9)}}, {})
assert store.names() == []
"""


def test_the_process_does_not_end_before_the_checkpoint_is_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert CheckpointStore(tmp_path, keep_last=1, spec_digest="d").load().name == "step-5"
