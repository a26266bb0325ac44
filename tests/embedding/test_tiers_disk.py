"""Tables on disk: whose directory it is, what a crash leaves, what a closed table keeps, and how much memory it takes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ninerank.embedding.table import initial_rows
from ninerank.embedding.tiers import TierConfig, TieredTable, backing, kept_columns
from ninerank.errors import CheckpointError, SpecError
from ninerank.fusion.kernels.embedding_update import FTRL, Adam

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def on_disk(directory: Path, *, name: str = "item", rows: int = 50, keep: bool = False, lr: float = 0.1, seed: int = 1) -> TieredTable:
    config = TierConfig(placement="disk", cache_rows=8, directory=str(directory), keep=keep)
    table = TieredTable(name, rows, {"deep": 4}, config, seed=seed)
    table.train_with(Adam(), lr)
    return table


def train(table: TieredTable, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        ids = torch.arange(step, step + 6) * 3 % table.num_rows("deep")
        table.rows("deep", table.prepare(ids, step=step)).square().sum().backward()
        table.update()
        table.finish_step(step)


def copied(table: TieredTable) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in table.state().items()}


def test_one_file_while_it_runs_and_nothing_after(tmp_path: Path) -> None:
    with on_disk(tmp_path / "scratch") as table:
        train(table, 5)
        assert sorted(file.name for file in (tmp_path / "scratch" / "item.tier").iterdir()) == ["lock", "owner.json", "rows.bin"]
        assert (tmp_path / "scratch" / "item.tier" / "rows.bin").stat().st_size == 50 * (3 * 4 * 4 + 4)
        state = table.state()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert state["state.deep.step"].sum() == 30  # mapped: there as long as somebody holds it
    table.close()


@pytest.mark.parametrize("is_read_first", [False, True])
def test_start_values_are_those_of_a_table_in_memory(is_read_first: bool, tmp_path: Path) -> None:
    """Over more than one block of rows, the state that depends on them included."""
    config = TierConfig(placement="disk", cache_rows=8, directory=str(tmp_path))
    with TieredTable("item", 70_000, {"deep": 3, "linear": 1}, config, seed=5, init_std=0.3) as table:
        assert list(tmp_path.iterdir()) == []
        if is_read_first:
            table.prepare(torch.tensor([69_999]))
        table.train_with(FTRL(l1=0.1), 0.2)
        assert (tmp_path / "item.tier" / "rows.bin").stat().st_size == 70_000 * 4 * 12
        state = table.state()
        for group, dim in (("deep", 3), ("linear", 1)):
            values = torch.cat([torch.from_numpy(block) for _, block in initial_rows(5, group, "item", 70_000, dim, 0.3)])
            z_RD, n_RD = FTRL(l1=0.1).new_state(values, torch.tensor([0.2]))
            assert torch.equal(state[f"value.{group}"], values)
            assert torch.equal(state[f"state.{group}.z"], z_RD)
            assert torch.equal(state[f"state.{group}.n"], n_RD)


def test_kept_and_read(tmp_path: Path) -> None:
    with on_disk(tmp_path, keep=True) as table:
        train(table, 20)
        with pytest.raises(CheckpointError, match="scratch of a run that did not close it"):
            kept_columns(tmp_path / "item.tier")
        state = copied(table)
    kept = kept_columns(tmp_path / "item.tier")
    assert kept.keys() == state.keys()
    for name, tensor in state.items():
        assert kept[name].dtype == tensor.dtype
        assert torch.equal(kept[name], tensor)
    kept["value.deep"].zero_()
    assert torch.equal(kept_columns(tmp_path / "item.tier")["value.deep"], state["value.deep"])
    with pytest.raises(SpecError, match=r"kept by an earlier run; remove .*item\.tier or name another directory"):
        on_disk(tmp_path)
    with pytest.raises(CheckpointError, match="holds no kept table"):
        kept_columns(tmp_path)
    rows = tmp_path / "item.tier" / "rows.bin"
    rows.write_bytes(rows.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="bytes, .* are needed"):
        kept_columns(tmp_path / "item.tier")
    (tmp_path / "item.tier" / "owner.json").write_text("{")
    with pytest.raises(SpecError, match="not valid JSON"):
        kept_columns(tmp_path / "item.tier")


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    with on_disk(tmp_path) as table:
        train(table, 3)
        state = copied(table)
        with pytest.raises(SpecError, match="in use by another process"):
            on_disk(tmp_path)
        with on_disk(tmp_path, name="user"):
            pass
        for name, tensor in table.state().items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("name", ["notes.txt", "folder"])
def test_what_is_not_ours_is_refused_and_left(tmp_path: Path, name: str) -> None:
    (tmp_path / "item.tier").mkdir()
    (tmp_path / "item.tier" / name).mkdir() if name == "folder" else (tmp_path / "item.tier" / name).write_text("mine")
    with pytest.raises(SpecError, match=f"holds '{name}', which no tier wrote"):
        on_disk(tmp_path)
    assert [file.name for file in (tmp_path / "item.tier").iterdir()] == [name]


def test_a_link_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "item.tier").mkdir()
    (tmp_path / "item.tier" / "rows.bin").symlink_to(tmp_path / "mine")
    with pytest.raises(SpecError, match=r"holds 'rows\.bin'"):
        on_disk(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="cannot be used"):
        on_disk(tmp_path / "file")
    with pytest.raises(SpecError, match="letters, digits"):
        on_disk(tmp_path, name="../item")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(backing.shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    with pytest.raises(SpecError, match=r"table 'item' takes 2600 bytes; .* has 1000 left"):
        on_disk(tmp_path)
    monkeypatch.undo()

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SpecError, match=r"rows\.bin cannot be written \(No space left on device\)"):
        on_disk(tmp_path)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]
    on_disk(tmp_path).close()


CRASH = """
    import sys, torch
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_tiers_disk import on_disk, train, copied
    table = on_disk(Path({directory!r}))
    train(table, 4)
    torch.save(copied(table), {checkpoint!r})
    print("saved", flush=True)
    for step in range(4, 10**9):
        train(table, 1, step)
"""


def test_after_a_crash_the_same_run_starts_anew_and_takes_its_checkpoint(tmp_path: Path) -> None:
    """Killed in the midst of training, whose rows are part on disk, part in the cache: nothing of that file is taken over."""
    directory, checkpoint = tmp_path / "scratch", tmp_path / "checkpoint.pt"
    script = textwrap.dedent(CRASH).format(tests=str(Path(__file__).parent), directory=str(directory), checkpoint=str(checkpoint))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "saved\n"
        with pytest.raises(SpecError, match="in use by another process"):
            on_disk(directory)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    before = (directory / "item.tier" / "rows.bin").read_bytes()
    for other in ({"lr": 0.2}, {"seed": 2}, {"rows": 51}):
        with pytest.raises(SpecError, match=r"the directory is another run's \((lr|seed|num_rows) "):
            on_disk(directory, **other)  # type: ignore[arg-type]
    assert (directory / "item.tier" / "rows.bin").read_bytes() == before
    with on_disk(tmp_path / "calm") as calm, on_disk(directory) as table:
        assert all(torch.equal(tensor, calm.state()[name]) for name, tensor in table.state().items())
        table.load_state(torch.load(checkpoint, weights_only=True))
        train(table, 3, first=4)
        train(calm, 7)
        assert all(torch.equal(tensor, calm.state()[name]) for name, tensor in table.state().items())


def test_a_crash_before_the_table_was_written(tmp_path: Path) -> None:
    for files in ({}, {"lock": ""}, {"lock": "", ".owner.json.0a1b2c3d.tmp": "{"}, {"rows.tmp": "half"}):
        (tmp_path / "item.tier").mkdir()
        for name, content in files.items():
            (tmp_path / "item.tier" / name).write_text(content)
        on_disk(tmp_path).close()
        assert not (tmp_path / "item.tier").exists()


def test_an_owner_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "item.tier").mkdir()
    for content, message in (("{", "not valid JSON"), (json.dumps({"format": 2}), "format")):
        (tmp_path / "item.tier" / "owner.json").write_text(content)
        with pytest.raises(SpecError, match=message):
            on_disk(tmp_path)
        assert (tmp_path / "item.tier" / "owner.json").read_text() == content


MEMORY = """
    import sys, torch
    from pathlib import Path
    from ninerank.embedding.tiers import TierConfig, TieredTable
    from ninerank.fusion.kernels.embedding_update import RowwiseAdagrad

    def anonymous_bytes():
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def peak_bytes(num_rows):
        config = TierConfig(placement="disk", cache_rows=5000, directory={directory!r})
        with TieredTable("item", num_rows, {{"deep": 24, "linear": 1}}, config, seed=1) as table:
            table.train_with(RowwiseAdagrad(), 0.1)
            assert sum(column[0].nbytes for column in table.state().values()) == 108
            peak = anonymous_bytes()
            for step in range(20):
                ids = torch.randint(0, num_rows, (4000,), generator=torch.Generator().manual_seed(step))
                table.rows("deep", table.prepare(ids, step=step)).sum().backward()
                table.update()
                table.finish_step(step)
            table.load_state(table.state())
            peak = max(peak, anonymous_bytes())
            for _, block in table.state_blocks():
                assert block["value.deep"].any()
                peak = max(peak, anonymous_bytes())
        return peak

    small = peak_bytes(131_072)
    print(peak_bytes(1_000_000) - small)
"""


@LINUX
def test_memory_of_the_process_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """A table of 108 MB takes hardly more of the process's own memory (not the system's file cache) than one of 14 MB.

    In a process of its own, whose allocator gives large blocks back at once.
    """
    script = textwrap.dedent(MEMORY).format(directory=str(tmp_path))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert int(outcome.stdout) < 108_000_000 / 4
