"""`ninerank replay LOG --bundle B | --target HOST:PORT`: score a request log again and compare."""

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.replay import Replay


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
    tolerance: Annotated[float, typer.Option(help="Largest score difference that passes; above it the exit code is 1.", min=0)] = 1e-6,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
    device: Annotated[str, typer.Option(help="Of the bundle: auto, cpu, cuda[:i] or npu[:i].")] = "auto",
    timeout_ms: Annotated[int, typer.Option(help="Of each request to the target.", min=1)] = 5000,
) -> None:
    """Score every request of a served log again: largest score difference, changed order, and quality if labels are given."""
    if (bundle is None) == (target is None):
        raise typer.BadParameter("give one of --bundle and --target", param_hint="--bundle / --target")
    import torch

    from ninerank.cli.progress import progress_bar
    from ninerank.evaluation.joined import Labels
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.evaluation.replay import count_requests, replay
    from ninerank.evaluation.replayer import BundleReplayer, EndpointReplayer
    from ninerank.evaluation.report import replay_page
    from ninerank.predictor.requestlog import read_log

    # As the server: requests are small, and threads that wait for each other cost more than they bring.
    torch.set_num_threads(1)
    check_writable(out)
    check_writable(report)
    total = count_requests(log)
    with BundleReplayer.load(bundle, device) if bundle is not None else EndpointReplayer(target or "", timeout_ms) as replayer:
        joined = None if labels is None else Labels(labels, replayer.tasks)
        with progress_bar("replay", total, "requests") as on_requests:
            found = replay(
                read_log(log),
                replayer,
                log=str(log),
                labels=joined,
                unlabelled=unlabelled.value,
                tolerance=tolerance,
                on_requests=on_requests,
            )
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
        "mean score difference": f"{parity.mean:.3g}",
        "candidates with another rank": f"{parity.num_flipped:,}",
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
    sign = "at most" if found.passed else "above"
    verdict = "PASS" if found.passed else "FAIL"
    console.print(f"{verdict}: largest score difference {parity.largest:.3g} is {sign} the tolerance {found.tolerance:g}", soft_wrap=True)
