"""What the graph compiler made of a bundle's graph: before, after, and pass by pass.

Costs are counted for one request with 256 candidates and histories of 50 ids (`fusion.cost`); times are measured here, on one thread.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

import torch
from torch import fx

from ninerank.evaluation.graphs import LEGEND, graph_svg
from ninerank.evaluation.page import facts_section, page, table_section, tiles
from ninerank.fusion.capture import REQUESTS, ROWS, inputs_of
from ninerank.fusion.compile import SINGLE, PassRecord, graph_for_one
from ninerank.fusion.cost import NOMINAL_LENGTH, NOMINAL_ROWS, Cost
from ninerank.fusion.editor import size_names
from ninerank.fusion.verify import draw_inputs
from ninerank.predictor.bundle import Bundle
from ninerank.predictor.graph import build_graph
from ninerank.predictor.manifest import Manifest

__all__ = ["FusionReport", "fusion_page", "fusion_report"]

MAX_RUNS, MAX_SECONDS = 50, 2.0


@dataclass(frozen=True)
class FusionReport:
    """A bundle's graphs and records. milliseconds_before, _after: median of the graph alone, one request, eager, one thread."""

    bundle: str
    manifest: Manifest
    source: fx.GraphModule
    compiled: fx.GraphModule
    milliseconds_before: float
    milliseconds_after: float
    difference: float

    @property
    def records(self) -> tuple[PassRecord, ...]:
        return self.manifest.passes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bundle": self.bundle,
            "model": self.manifest.model_name,
            "version": self.manifest.model_version,
            "candidates": NOMINAL_ROWS,
            "sequence_length": NOMINAL_LENGTH,
            "before": {**self.manifest.graph_before.model_dump(), "milliseconds": self.milliseconds_before},
            "after": {**self.manifest.graph_after.model_dump(), "milliseconds": self.milliseconds_after},
            "largest_difference": self.difference,
            "passes": [record.model_dump(mode="json") for record in self.records],
        }


def fusion_report(bundle: Bundle) -> FusionReport:
    """Read both graphs of a bundle and time them; raises BundleError for graphs that are malformed."""
    device = torch.device("cpu")
    source, compiled = build_graph(bundle.source, device), build_graph(bundle.graph, device)
    sizes = dict.fromkeys(size_names(source), NOMINAL_LENGTH) | {REQUESTS: 1, ROWS: NOMINAL_ROWS}
    batch = draw_inputs(inputs_of(source), sizes, torch.Generator().manual_seed(0))
    of_one = graph_for_one(compiled, bundle.manifest.passes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {module: [batch[given.name] for given in inputs_of(module)] for module in (source, of_one)}
        with torch.inference_mode():
            before, after = (torch.sigmoid(module(*tensors)) for module, tensors in runs.items())
            times = _measured(runs)
    finally:
        torch.set_num_threads(threads)
    difference = float((before - after).abs().max())
    return FusionReport(str(bundle.directory), bundle.manifest, source, compiled, times[0], times[1], difference)


def _measured(runs: dict[fx.GraphModule, list[torch.Tensor]]) -> list[float]:
    """Median milliseconds of each, taken in turns so that a busy moment hits both."""
    taken: dict[fx.GraphModule, list[float]] = {module: [] for module in runs}
    stop = time.perf_counter() + MAX_SECONDS
    for _ in range(MAX_RUNS):
        for module, tensors in runs.items():
            start = time.perf_counter()
            module(*tensors)
            taken[module].append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() > stop:
            break
    return [median(values) for values in taken.values()]


def fusion_page(report: FusionReport) -> str:
    """HTML page of a report."""
    manifest = report.manifest
    facts = {
        "Bundle": report.bundle,
        "Counted for": f"one request with {NOMINAL_ROWS} candidates, histories of {NOMINAL_LENGTH} ids, in float32",
        "Times": "median of the dense graph alone, eager, one thread of this machine, random inputs",
        "Largest score difference": f"{report.difference:.2g} between the two graphs on the inputs that were timed",
        "Compiled in": f"{sum(record.milliseconds for record in report.records) / 1e3:.2f} s, checks included",
    }
    return page(
        f"{manifest.model_name} {manifest.model_version}", "Graph before and after fusion", [*_sections(report), facts_section(facts)]
    )


def _sections(report: FusionReport) -> Iterable[str]:
    before, after = report.manifest.graph_before, report.manifest.graph_after
    fired = len({record.name for record in report.records if record.fired and not record.withdrawn and record.name != SINGLE})
    yield (
        f'<p class="verdict">The compiled graph needs {_share(after.flops, before.flops)} of the arithmetic, '
        f"{_share(after.bytes_moved, before.bytes_moved)} of the memory traffic and {after.launches} kernels instead of {before.launches} "
        f"for one request; {fired} passes changed it.</p>"
    )
    yield tiles(
        {
            "Operations": (_count(after.flops), f"from {_count(before.flops)}"),
            "Bytes moved": (_count(after.bytes_moved), f"from {_count(before.bytes_moved)}"),
            "Launches": (f"{after.launches}", f"from {before.launches}"),
            "Nodes": (f"{after.nodes}", f"from {before.nodes}"),
            "Time": (f"{report.milliseconds_after:.2f} ms", f"from {report.milliseconds_before:.2f} ms"),
        }
    )
    heads = ("Pass", "Round", "Fired", "Outcome", "Operations", "Bytes", "Launches", "Nodes", "Score difference", "Time, ms")
    yield table_section("Passes", heads, [_row(record) for record in report.records])
    legend = " ".join(f'<span class="role {role}">{escape(text)}</span>' for role, text in LEGEND.items())
    hint = "U requests, B candidates; a dashed box repeats the rows of requests for their candidates; point at a box for its weights."
    yield f'<h2>Graph</h2><p class="hint">{legend} {hint}</p>'
    for title, module in (("Before", report.source), ("After, for any number of requests", report.compiled)):
        svg = graph_svg(module, f"{title}: the dense graph of {report.manifest.model_name}")
        yield f'<figure class="card scroll graph"><h3>{escape(title)}</h3>{svg}</figure>'


def _row(record: PassRecord) -> list[str]:
    if not record.round:
        return [escape(record.name), "", "", '<span class="hint">nothing to do</span>', *[""] * 6]
    outcome = (
        f'<span class="why"><span class="bad">withdrawn</span>: {escape(record.why)}</span>'
        if record.withdrawn
        else '<span class="good">kept</span>'
    )
    changes = [_change(getattr(record.before, name), getattr(record.after, name)) for name in ("flops", "bytes_moved", "launches", "nodes")]
    return [
        escape(record.name),
        str(record.round),
        str(record.fired),
        outcome,
        *changes,
        f"{record.difference:.1e}",
        f"{record.milliseconds:.0f}",
    ]


def _change(before: int, after: int) -> str:
    if before == after:
        return "="
    return f"{_count(before)} → {_count(after)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "all"


def _count(value: float) -> str:
    """A count with a unit.

    >>> _count(950), _count(12_300), _count(4_560_000)
    ('950', '12.3 k', '4.56 M')
    """
    for unit in ("", " k", " M", " G", " T"):
        if value < 1000 or unit == " T":
            return f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError


def cost_line(cost: Cost) -> str:
    """One line of counts, for a terminal."""
    return f"{cost.nodes} nodes, {cost.launches} launches, {_count(cost.flops)} operations, {_count(cost.bytes_moved)} bytes"
