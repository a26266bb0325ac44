"""Few shapes, the same scores: padding never shows, what cannot be recorded runs as before, and recordings are replayed on fresh inputs."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ninerank.fusion.backends import buckets, recorded
from ninerank.fusion.backends.buckets import Bucketed, bucket
from ninerank.fusion.backends.recorded import Recorded
from ninerank.fusion.capture import REQUESTS, ROWS, GraphInput, capture
from ninerank.fusion.single import single_request
from ninerank.towers.blocks.attention import TargetAttention

INPUTS = (
    GraphInput("user", "request", (REQUESTS, 4)),
    GraphInput("item", "item", (ROWS, 4)),
    GraphInput("history", "request", (REQUESTS, "L", 4)),
    GraphInput("mask", "request", (REQUESTS, "L"), torch.bool),
    GraphInput("user_row", "joint", (ROWS,), torch.int64),
)


class Tower(nn.Module):
    """A history, weighted by what the candidate is, beside both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = TargetAttention(4, (8,), "relu"), nn.Linear(12, 1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        row = inputs["user_row"]
        history, mask = inputs["history"].index_select(0, row), inputs["mask"].index_select(0, row)
        interest = self.attention(inputs["item"], history, mask)
        logits: Tensor = self.out(torch.cat([inputs["user"].index_select(0, row), inputs["item"], interest], dim=1))
        return logits


torch.manual_seed(0)
GRAPH = capture(Tower().eval(), INPUTS)


def inputs(requests: int, rows: int, length: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(100 * requests + 10 * rows + length)
    user, item, history = (torch.randn(shape, generator=draw) for shape in ((requests, 4), (rows, 4), (requests, length, 4)))
    mask = torch.arange(length) < torch.randint(0, length + 1, (requests, 1), generator=draw)
    return user, item, history, mask, torch.randint(0, requests, (rows,), generator=draw)


@given(st.integers(1, 100_000))
def test_buckets_are_few_and_waste_little(size: int) -> None:
    assert size <= bucket(size) < max(size * 1.5, size + 1)
    assert bucket(bucket(size)) == bucket(size)
    assert bucket(size) <= bucket(size + 1)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 12))
def test_padding_never_shows(requests: int, rows: int, length: int) -> None:
    graph = single_request(GRAPH) if requests == 1 else GRAPH
    seen: list[tuple[int, ...]] = []

    def record(example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        seen.append(tuple(example[1].shape))

        def run(*padded: Tensor) -> Tensor:
            assert [tensor.shape for tensor in padded] == [tensor.shape for tensor in example]
            return graph(*padded)

        return run

    run = Bucketed(INPUTS, record, graph)
    values = inputs(requests, rows, length)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(run(*values), graph(*values), rtol=1e-5, atol=1e-6)
    assert seen == ([(bucket(rows), 4)] if rows else [])


def test_shapes_are_recorded_once_for_all_threads() -> None:
    recordings: list[int] = []

    def record(example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        recordings.append(example[1].shape[0])
        return GRAPH

    run = Bucketed(INPUTS, record, GRAPH)
    with torch.inference_mode():
        wanted = {rows: GRAPH(*inputs(2, rows, 3)) for rows in range(1, 30)}
    wrong: list[int] = []

    def call() -> None:
        with torch.inference_mode():
            wrong.extend(rows for rows, logits in wanted.items() if not torch.allclose(run(*inputs(2, rows, 3)), logits, atol=1e-6))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(recordings) == sorted({bucket(rows) for rows in wanted}) == sorted(shape[1] for shape in run.shapes)


def test_beyond_the_bound_nothing_more_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_SHAPES", 2)
    run = Bucketed(INPUTS, lambda example: GRAPH, GRAPH)
    for rows in (2, 5, 9, 17):
        assert run(*inputs(2, rows, 3)).shape == (rows, 1)
    assert len(run.shapes) == 2


def test_what_cannot_be_recorded_runs_as_before_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def record(example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    run = Bucketed(INPUTS, record, GRAPH)
    values = inputs(2, 5, 3)
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(run(*values), GRAPH(*values))
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == (
        "shape (U 2, B 6, L 3) cannot be recorded and runs launch by launch, slower "
        "(RuntimeError: operation not permitted when stream is capturing)"
    )


def test_a_recording_reads_fresh_inputs_and_hands_out_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a device that records what it is asked to do between the start and the end of a recording, and does it again on replay."""
    launches: list[Callable[[], None]] = []
    is_open = False

    def run(x: Tensor, y: Tensor) -> Tensor:
        out = x + 2 * y
        if is_open:
            launches.append(lambda: out.copy_(x + 2 * y))
        return out

    class Graph:
        def replay(self) -> None:
            for launch in launches:
                launch()

    @contextmanager
    def graph(_: Graph) -> Iterator[None]:
        nonlocal is_open
        is_open = True
        yield
        is_open = False

    @contextmanager
    def on(_: object) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    device = SimpleNamespace(Stream=lambda device: stream, current_stream=lambda device: stream, stream=on, CPUGraph=Graph, graph=graph)
    monkeypatch.setitem(recorded.GRAPHS, "cpu", "CPUGraph")
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    example = (torch.ones(3), torch.ones(3))
    replayed = Recorded(run, example)
    assert len(launches) == 1
    first = replayed(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 1, 1]))
    second = replayed(torch.zeros(3), torch.ones(3))
    assert first.tolist() == [3, 4, 5]
    assert second.tolist() == [2, 2, 2]
    assert example[0].tolist() == [1, 1, 1], "the caller's tensors are nobody's buffer"
