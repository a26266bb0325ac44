"""Kernels are found by name or by device, and what cannot run says why."""

import logging
import threading

import pytest
import torch

from ninerank.errors import DeviceError
from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_bag import embedding_bag

WEIGHT, ROWS = torch.arange(12.0).view(6, 2), torch.tensor([1, 5])


def test_auto_on_cpu_is_numba() -> None:
    with registry.count_dispatches() as counts:
        embedding_bag(WEIGHT, ROWS, None, 1)
    assert counts == {("embedding_bag", "numba"): 1}


def test_a_named_kernel_is_the_one_that_runs() -> None:
    with registry.count_dispatches() as counts:
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="torch")
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="torch")
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="numba")
    assert counts == {("embedding_bag", "torch"): 2, ("embedding_bag", "numba"): 1}


def test_counting_sees_other_threads_and_ends() -> None:
    with registry.count_dispatches() as counts:
        worker = threading.Thread(target=lambda: embedding_bag(WEIGHT, ROWS, None, 1))
        worker.start()
        worker.join()
    embedding_bag(WEIGHT, ROWS, None, 1)
    assert counts == {("embedding_bag", "numba"): 1}


def test_unknown_kernel_lists_those_there() -> None:
    with pytest.raises(
        DeviceError, match=r"embedding_bag: kernel 'cutlass' cannot run on cpu: it has no such kernel; kernels that can: auto, numba, torch"
    ):
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="cutlass")


def test_triton_on_cpu_says_when_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1"):
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="triton")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="package triton is not installed"):
        registry.choose("embedding_bag", "cuda", "triton")
    assert registry.available("embedding_bag", "cuda") == ("torch",)


def test_unknown_operator_names_the_nearest() -> None:
    with pytest.raises(DeviceError, match="did you mean 'embedding_bag'"):
        registry.choose("embedding_bags", "cpu")


def test_two_kernels_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="has a kernel 'torch' already"):
        registry.register(registry.Kernel("embedding_bag", "torch", "nowhere", "run"))


def test_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_chosen", {})
    with caplog.at_level(logging.INFO, logger=registry.__name__):
        for _ in range(3):
            embedding_bag(WEIGHT, ROWS, None, 1)
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="torch")
    assert [record.getMessage() for record in caplog.records] == ["operator embedding_bag on cpu: kernel numba (of numba, torch)"]


def test_a_preferred_kernel_runs_where_it_can_and_in_its_thread_alone() -> None:
    with registry.count_dispatches() as counts, registry.preferring("torch"):
        embedding_bag(WEIGHT, ROWS, None, 1)
        embedding_bag(WEIGHT, ROWS, None, 1, kernel="numba")  # what is asked for by name stays so
        worker = threading.Thread(target=lambda: embedding_bag(WEIGHT, ROWS, None, 1))
        worker.start()
        worker.join()
        with registry.preferring("triton"):
            assert registry.choose("bag_entries", "cpu") is registry.choose("bag_entries", "cpu", "numba")
    assert counts == {("embedding_bag", "torch"): 1, ("embedding_bag", "numba"): 2, ("bag_entries", "numba"): 2}
