"""`ninerank replay LOG --bundle B | --target HOST:PORT`: score a request log again and compare."""

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ninerank.evaluation.replay import Replay
    from ninerank.evaluation.skew import Skew


class Cluster(str, Enum):
    """Where the processes of a replay run."""

    local = "local"
    ray = "ray"


class Precision(str, Enum):
    """Of hidden layers."""

    fp32 = "fp32"
    bf16 = "bf16"


TOLERANCE = {Precision.fp32: 1e-6, Precision.bf16: 1e-3}


class Unlabelled(str, Enum):
    """What a candidate without a label counts as."""

    skip = "skip"
    zero = "zero"


def run(
    log: Annotated[
        Path, typer.Argument(help="Request log: a file, or the directory that `ninerank serve --log` wrote.", show_default=False)
    ],
    bundle: Annotated[Path | None, typer.Option(help="Score with this bundle, in this process.")] = None,
    target: Annotated[str | None, typer.Option(help="Score with the server at HOST:PORT.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Parquet, CSV or TSV with request_id, candidate_id (or index, from 0) and a label column.")
    ] = None,
    unlabelled: Annotated[
        Unlabelled, typer.Option(help="Candidates without a label: left out, or counted as 0 (where only clicks are recorded).")
    ] = Unlabelled.skip,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest score difference that passes; above it the exit code is 1. Default: 1e-6, 1e-3 in bf16.", min=0),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Rank flips among the first K are told apart.", min=1)] = 10,
    max_top_flips: Annotated[
        float | None, typer.Option(help="Share of candidates whose rank among the first K may change; above it the exit code is 1.", min=0)
    ] = None,
    item_snapshot: Annotated[
        Path | None, typer.Option(help="Parquet of item features as they were: the logged ones are held against it.")
    ] = None,
    item_key: Annotated[str, typer.Option(help="Column of item ids in the item snapshot.")] = "item_id",
    user_snapshot: Annotated[Path | None, typer.Option(help="The same of users.")] = None,
    user_key: Annotated[str, typer.Option(help="Column of user ids, in the user snapshot and in the request.")] = "user_id",
    snapshot_time: Annotated[
        str | None,
        typer.Option(help="Column of the snapshots that says from when a row is valid; finds values that leaked from the future."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second; default: as fast as it goes.", min=1e-3)] = None,
    speed: Annotated[float | None, typer.Option(help="At the pace of the log, this many times as fast.", min=1e-3)] = None,
    shuffle: Annotated[int | None, typer.Option(help="In an order drawn from this seed, not in that of time.", min=0)] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.", min=1, max=1024)] = 1,
    processes: Annotated[int, typer.Option(help="Processes that share the log.", min=1, max=256)] = 1,
    where: Annotated[Cluster, typer.Option(help="Where they run: on this machine, or on the Ray cluster of RAY_ADDRESS.")] = Cluster.local,
    work: Annotated[
        Path | None, typer.Option(help="Keep scores in this folder, so that the same command goes on where it was interrupted.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
    device: Annotated[str, typer.Option(help="Of the bundle: auto, cpu, cuda[:i] or npu[:i].")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Of the bundle's hidden layers.")] = Precision.fp32,
    timeout_ms: Annotated[int, typer.Option(help="Of each request to the target.", min=1)] = 5000,
) -> None:
    """Score every request of a served log again: largest score difference, changed order, and quality if labels are given."""
    if (bundle is None) == (target is None):
        raise typer.BadParameter("give one of --bundle and --target", param_hint="--bundle / --target")
    from ninerank.cli.progress import progress_bar
    from ninerank.evaluation.job import ReplayJob, SnapshotFile, run_job
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.evaluation.replay import count_requests
    from ninerank.evaluation.report import replay_page
    from ninerank.evaluation.schedule import Schedule

    check_writable(out)
    check_writable(report)
    snapshots = []
    if item_snapshot is not None:
        snapshots.append(SnapshotFile("item", item_snapshot, item_key, snapshot_time))
    if user_snapshot is not None:
        snapshots.append(SnapshotFile("request", user_snapshot, user_key, snapshot_time))
    schedule = {"rate": rate, "speed": speed, "shuffle_seed": shuffle, "concurrency": concurrency}
    job = ReplayJob(
        log=log,
        bundle=bundle,
        target=target,
        device=device,
        precision=precision.value,
        timeout_ms=timeout_ms,
        labels=labels,
        unlabelled=unlabelled.value,
        tolerance=TOLERANCE[precision] if tolerance is None else tolerance,
        snapshots=tuple(snapshots),
        schedule=Schedule.parse(schedule, "replay"),
        top_k=top_k,
        max_top_flips=max_top_flips,
        work=work,
    )
    with progress_bar("replay", count_requests(log), "requests") as on_requests:
        found = run_job(job, processes=processes, where=where.value, on_requests=on_requests)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    if report is not None:
        write_text(report, replay_page(found))
    if as_json:
        print(text)
    else:
        _print(found)
        for path in filter(None, (out, report)):
            print(f"wrote {path}")
    if not found.passed:
        raise typer.Exit(1)


def _print(found: "Replay") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ninerank.cli.tables import output, quality_table

    console = output()
    parity = found.parity
    table = Table(
        title=f"replay of {found.log}", title_justify="left", title_style="bold", show_header=False, box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column()
    table.add_column(overflow="fold")
    served, answered = (", ".join(f"{name} {version}" for name, version in models) for models in (found.served, found.answered))
    for name, value in {
        "served by": served,
        f"scored again by {found.kind}": answered,
        "requests": f"{parity.num_requests:,}",
        "candidates": f"{parity.num_candidates:,}",
        "requests/s": f"{parity.num_requests / found.seconds:,.0f}",
        "largest score difference": f"{parity.largest:.3g}",
        "99.9% of score differences at most": f"{parity.quantile(0.999):.3g}",
        "mean score difference": f"{parity.mean:.3g}",
        "candidates with another rank": f"{parity.num_flipped:,}",
        f"of those, in the top {parity.top_k}": f"{parity.num_top_flipped:,}",
        "requests with another order": f"{parity.num_reordered:,}",
        "requests with another best candidate": f"{parity.num_top_changed:,}",
    }.items():
        table.add_row(name, Text(value))
    console.print(table)
    for task, again in found.again.items():
        console.print(quality_table(task, {"as served": found.logged[task].summary(), "scored again": again.summary()}))
    if found.joined is not None:
        console.print("labels: " + ", ".join(f"{count:,} {name}" for name, count in found.joined.as_dict().items()))
    if parity.worst is not None and not found.passed:
        worst = parity.worst
        place = f"request {worst.request_id}, candidate {worst.index}"
        console.print(f"largest at {place}: {worst.logged:.9g} as served, {worst.again:.9g} now", markup=False, soft_wrap=True)
    if found.skew is not None:
        console.print(_skew_table(found.skew))
        if not found.skew.checks_future:
            console.print("values from the future cannot be told: name the column of times (--snapshot-time)")
    gate = Table(title="gate", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "found", "allowed", "verdict"):
        gate.add_column(name, justify="left" if name in {"", "verdict"} else "right", overflow="fold")
    for check in found.checks:
        gate.add_row(Text(check.name), f"{check.found:.3g}", f"{check.allowed:g}", "PASS" if check.passed else "FAIL")
    console.print(gate)
    failed = sum(not check.passed for check in found.checks)
    console.print(f"FAIL: {failed} of {len(found.checks)} checks" if failed else f"PASS: {len(found.checks)} checks", soft_wrap=True)


def _skew_table(skew: "Skew") -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="features as logged against the snapshot", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("column", overflow="fold")
    for name in ("values", "shifted", "defaulted", "unexpected", "future", "requests blamed on it"):
        table.add_column(name, justify="right")
    table.add_column("first", overflow="fold")
    for name, own in skew.columns.items():
        first = next(iter(own.examples.values()), None)
        place = "" if first is None or first.candidate is None else f" candidate {first.candidate}"
        shown = "" if first is None else f"request {first.request_id}{place}: {first.logged} logged, {first.expected} expected"
        counts = (own.compared, own.shifted, own.defaulted, own.unexpected, own.future, own.blamed)
        table.add_row(Text(name), *(f"{count:,}" for count in counts), Text(shown))
    return table
