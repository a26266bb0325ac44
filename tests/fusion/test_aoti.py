"""Graphs compiled ahead: found again by what they are, whatever the values of their weights; made again where the file is damaged."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ninerank.errors import BundleError
from ninerank.fusion import backends
from ninerank.fusion.backends import aoti
from ninerank.fusion.capture import REQUESTS, ROWS, GraphInput, capture
from ninerank.fusion.single import single_request

CPU = torch.device("cpu")
INPUTS = (
    GraphInput("user", "request", (REQUESTS, 4)),
    GraphInput("item", "item", (ROWS, 4)),
    GraphInput("user_row", "joint", (ROWS,), torch.int64),
)


class Tower(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.user, self.item, self.out = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(width, 1)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        user = self.user(inputs["user"]).index_select(0, inputs["user_row"])
        logits: Tensor = self.out(torch.relu(user + self.item(inputs["item"])))
        return logits


def graph(seed: int = 0, width: int = 8) -> fx.GraphModule:
    torch.manual_seed(seed)
    return capture(Tower(width).eval(), INPUTS)


def inputs(requests: int, rows: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(requests + rows)
    user, item = (torch.randn(count, 4, generator=draw) for count in (requests, rows))
    return user, item, torch.randint(0, requests, (rows,), generator=draw)


def test_the_key_is_the_graphs_and_not_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    own = aoti.key_of(graph(), CPU)
    assert own == aoti.key_of(graph(seed=1), CPU)
    others = [aoti.key_of(graph(width=16), CPU), aoti.key_of(single_request(graph()), CPU), aoti.key_of(graph(), CPU, one_request=True)]
    monkeypatch.setattr(torch, "__version__", "2.99")
    others.append(aoti.key_of(graph(), CPU))
    assert len({own, *others}) == 5


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """In the place of AOTInductor one that keeps the program in memory; the list says what was compiled."""
    programs: dict[str, Any] = {}
    compiled: list[str] = []

    def compile_and_package(program: Any, package_path: str) -> str:
        text = f"program {len(programs)}"
        programs[text] = program.module()
        Path(package_path).write_text(text)
        compiled.append(text)
        return package_path

    def load_package(path: str, device_index: int) -> Any:
        text = Path(path).read_text()
        if text not in programs:
            raise RuntimeError("not a zip archive")
        return programs[text]

    monkeypatch.setenv("NINERANK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load_package)
    return compiled


def check(module: fx.GraphModule) -> None:
    run = backends.lower(module, CPU, one=single_request(module), backend="aoti")
    for requests, rows in ((1, 1), (1, 9), (3, 5), (4, 40)):
        values = inputs(requests, rows)
        with torch.inference_mode():
            torch.testing.assert_close(run(*values), module(*values), rtol=1e-5, atol=1e-6)


def test_code_is_compiled_once_and_serves_other_weights(compiler: list[str], tmp_path: Path) -> None:
    for seed in (0, 1, 0):
        check(graph(seed))
    assert len(compiler) == 2, "for many requests, and for one"
    assert len(list((tmp_path / "cache").iterdir())) == 2, "and nothing temporary is left"


def test_a_damaged_file_is_made_again(compiler: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(graph())
    for file in (tmp_path / "cache").iterdir():
        file.write_text("damaged")
    with caplog.at_level(logging.WARNING):
        check(graph())
    assert len(compiler) == 4
    assert sum("cannot be read and is made again" in record.getMessage() for record in caplog.records) == 2


def test_a_folder_that_cannot_be_written_costs_a_compilation(
    compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NINERANK_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        check(graph())
        check(graph())
    assert len(compiler) == 4
    assert "NINERANK_CACHE_DIR names another folder" in caplog.text


def test_a_graph_that_cannot_be_compiled_is_an_error(compiler: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: Any, package_path: str) -> str:
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(BundleError, match=r"AOTInductor cannot compile the graph for cpu: RuntimeError: no g\+\+$"):
        backends.lower(graph(), CPU, backend="aoti")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch of its own export
def test_aotinductor_gives_the_graphs_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NINERANK_CACHE_DIR", str(tmp_path))
    check(graph())
    monkeypatch.setattr(aoti, "_compile", None)  # all is there
    check(graph(seed=1))
