"""What every benchmark shares: fair timing, the facts about the machine, a table, and `bench/results/<name>.json`.

Benchmarks run as `python bench/<name>.py` (or `make bench NAME=<name>`), so this folder is first on sys.path:

    from harness import Result, interleave

    with Result("lookup", shapes={"rows": 100_000, "dim": 16}) as result:
        times = interleave({"ours": ours, "torch": theirs}, rounds=50, warmup=5)
        result.timings(times)
        result.ratio("torch / ours", times["torch"].p50_ms / times["ours"].p50_ms)

Leaving the block prints the table and writes the file: machine, versions, commit, shapes, figures {name: value} and
ratios {name: value}. The last run's file is gone as soon as a run starts, so that a failed run leaves none.
"""

import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Result", "Timing", "interleave", "percentile"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    *("ninerank", "torch", "numpy", "numba", "pyarrow", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton", "triton-ascend"),
    *("torch_npu", "grpcio", "protobuf", "redis"),
)


@dataclass(frozen=True)
class Timing:
    """Wall time of one call over all rounds, in milliseconds."""

    p50_ms: float
    p99_ms: float
    min_ms: float
    rounds: int

    @property
    def median_ms(self) -> float:
        return self.p50_ms

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summary of single calls' times in seconds."""
        return cls(percentile(seconds, 50) * 1e3, percentile(seconds, 99) * 1e3, min(seconds) * 1e3, len(seconds))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time the calls in turns, so that a busy neighbour or a warm clock hits all of them alike.

    Each round runs every call once, beginning with another one each time. synchronize: waits for a device's queue (`Device.synchronize`).
    """
    wait = synchronize or (lambda: None)
    for call in calls.values():
        for _ in range(warmup):
            call()
    wait()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                calls[name]()
                wait()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}


def percentile(values: list[float], q: float) -> float:
    """Smallest value that at least q percent of the values do not exceed."""
    if not values:
        raise ValueError("percentile of no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q / 100 * len(ordered)) - 1)]


class Result:
    """Figures of one benchmark; as a context manager it prints and writes them when the block ends without an error."""

    def __init__(self, name: str, shapes: Mapping[str, Any], results: Path = RESULTS) -> None:
        self.name = name
        self.shapes = dict(shapes)
        self.figures: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.path = results / f"{name}.json"

    def __enter__(self) -> "Result":
        self.path.unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.show()
            self.write()

    def figure(self, name: str, value: float) -> None:
        """Add one measured value; its name carries the unit: `train_samples_per_s`, `serve_p99_ms`."""
        self.figures[name] = _finite(name, value)

    def timings(self, times: Mapping[str, Timing]) -> None:
        """Add p50, p99 and the least of each timing as figures."""
        for name, timing in times.items():
            for field in ("p50_ms", "p99_ms", "min_ms"):
                self.figure(f"{name}_{field}", getattr(timing, field))

    def ratio(self, name: str, value: float) -> None:
        """Add one ratio, which other machines can be compared by."""
        self.ratios[name] = _finite(name, value)

    def show(self) -> None:
        """Print the table."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in self.shapes.items()), title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for section in (self.figures, self.ratios):
            for name, value in section.items():
                table.add_row(name, _rounded(value))
            table.add_section()
        Console().print(table)

    def write(self) -> None:
        """Write the JSON file under a temporary name and rename it."""
        content = {
            "name": self.name,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "shapes": self.shapes,
            "figures": self.figures,
            "ratios": self.ratios,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".json.tmp")
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(self.path)
        where = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        print(f"written: {where}")


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, load, and the accelerator if one is visible."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "platform": platform.platform(),
        "load_1min": round(os.getloadavg()[0], 2),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    elif torch is not None and hasattr(torch, "npu") and torch.npu.is_available():
        facts["accelerator"] = torch.npu.get_device_name()
    if torch is not None:
        facts["torch_threads"] = torch.get_num_threads()
    return facts


def versions() -> dict[str, str]:
    """Python and those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Commit of the checkout, with `-dirty` where files differ from it; `unknown` outside a checkout."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    try:
        outcome = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return outcome.stdout.strip() if outcome.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine()
    )


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}: {value} is no finite number")
    return float(value)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
