"""The benchmark harness: fair turns, right percentiles, and a result file that is whole or absent."""

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = util.spec_from_file_location("harness", ROOT / "bench" / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["harness"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


harness = load()


def test_calls_take_turns() -> None:
    turns: list[str] = []
    times = harness.interleave({name: lambda name=name: turns.append(name) for name in "abc"}, rounds=4, warmup=1)
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert set(times) == set("abc")
    for timing in times.values():
        assert timing.rounds == 4
        assert 0 <= timing.min_ms <= timing.median_ms == timing.p50_ms <= timing.p99_ms


def test_the_device_is_waited_for_after_each_call() -> None:
    events: list[str] = []
    harness.interleave({"a": lambda: events.append("a")}, rounds=2, warmup=1, synchronize=lambda: events.append("wait"))
    assert events == ["a", "wait", "a", "wait", "a", "wait"]


def test_garbage_collection_is_back_after_an_error() -> None:
    import gc

    with pytest.raises(ZeroDivisionError):
        harness.interleave({"a": lambda: 1 / 0}, rounds=1, warmup=0)
    assert gc.isenabled()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0, 100))
def test_percentile_is_the_smallest_value_that_suffices(values: list[float], q: float) -> None:
    found = harness.percentile(values, q)
    assert found in values
    need = q / 100 * len(values)
    assert sum(value <= found for value in values) >= need - 1e-9
    below = [value for value in values if value < found]
    assert len(below) < max(need, 1e-9) + 1e-9 or not below


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        harness.percentile([], 50)


def test_a_result_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with harness.Result("lookup", {"rows": 10}, results=tmp_path) as result:
        result.timings(harness.interleave({"ours": lambda: None}, rounds=3))
        result.figure("samples_per_s", 123456.0)
        result.ratio("theirs / ours", 2.5)
    written = json.loads((tmp_path / "lookup.json").read_text())
    assert {"machine", "versions", "commit", "shapes", "figures", "ratios"} <= set(written)
    assert written["shapes"] == {"rows": 10}
    assert written["figures"]["samples_per_s"] == 123456.0
    assert {"ours_p50_ms", "ours_p99_ms", "ours_min_ms"} <= set(written["figures"])
    assert written["ratios"] == {"theirs / ours": 2.5}
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["torch"].startswith("2.13")
    out = capsys.readouterr().out
    assert "123,456" in out
    assert "theirs / ours" in out
    assert [path.name for path in tmp_path.iterdir()] == ["lookup.json"]


def test_a_run_that_fails_leaves_no_result(tmp_path: Path) -> None:
    (tmp_path / "lookup.json").write_text("{}")
    with pytest.raises(RuntimeError, match="broken"), harness.Result("lookup", {}, results=tmp_path):
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_finite_values_are_taken(value: float, tmp_path: Path) -> None:
    result = harness.Result("lookup", {}, results=tmp_path)
    with pytest.raises(ValueError, match="no finite number"):
        result.figure("x", value)


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert harness.commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = harness.commit()
    assert len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert harness.commit() == f"{clean}-dirty"
