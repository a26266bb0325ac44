"""`ninerank compare A B --log L --labels F`: is B better than A, and may it be launched?"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ninerank.cli.replay import Cluster, Unlabelled

if TYPE_CHECKING:
    from ninerank.evaluation.compare.differences import Difference
    from ninerank.evaluation.compare.verdict import Comparison

SERVED = "served"


def run(
    a: Annotated[str, typer.Argument(help="Bundle that is there now, or `served`: the scores as the log has them.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Bundle that may take its place.", show_default=False)],
    log: Annotated[Path, typer.Option(help="Request log: a file or a folder of them.")],
    labels: Annotated[Path, typer.Option(help="Parquet, CSV or TSV with request_id, candidate_id (or index, from 0) and a label column.")],
    unlabelled: Annotated[Unlabelled, typer.Option(help="Candidates without a label: left out, or counted as 0.")] = Unlabelled.skip,
    rules: Annotated[Path | None, typer.Option(help="YAML of the primary metric, level and guardrails.")] = None,
    slices: Annotated[
        list[str] | None, typer.Option("--slice", help="Logged feature to break the result down by; may be repeated.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Exit code 1 unless B is better and keeps every guardrail.")] = False,
    processes: Annotated[int, typer.Option(help="Processes that share the log.", min=1, max=256)] = 1,
    where: Annotated[Cluster, typer.Option(help="Where they run: on this machine, or on the Ray cluster of RAY_ADDRESS.")] = Cluster.local,
    device: Annotated[str, typer.Option(help="Of the bundles: auto, cpu, cuda[:i] or npu[:i].")] = "auto",
) -> None:
    """Compare two models over a served log with labels: paired differences, slices, guardrails, one verdict."""
    from ninerank.cli.progress import progress_bar
    from ninerank.evaluation.compare.page import comparison_page
    from ninerank.evaluation.compare.rules import Rules
    from ninerank.evaluation.compare.run import compare_bundles
    from ninerank.evaluation.compare.scoring import CompareJob
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.evaluation.replay import count_requests

    check_writable(out)
    check_writable(report)
    decided_by = Rules.load(rules)
    job = CompareJob(
        log=log,
        labels=labels,
        a=None if a == SERVED else Path(a),
        b=b,
        device=device,
        unlabelled=unlabelled.value,
        slices=tuple(dict.fromkeys(slices or ())),
        top_k=decided_by.top_k,
    )
    with progress_bar("compare", count_requests(log), "requests") as on_requests:
        found = compare_bundles(job, decided_by, processes=processes, where=where.value, on_requests=on_requests)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    if report is not None:
        write_text(report, comparison_page(found))
    if as_json:
        print(text)
    else:
        _print(found)
        for path in filter(None, (out, report)):
            print(f"wrote {path}")
    if gate and not found.launch:
        raise typer.Exit(1)


def _print(found: "Comparison") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ninerank.cli.tables import number, output

    console = output()
    console.print(f"A {found.names[0]}, B {found.names[1]}: {found.compared.num_requests:,} requests of {found.log}", markup=False)
    whole: dict[str, Difference] = dict(found.metrics)  # type: ignore[arg-type]
    tables = {"all": whole, **{f"{found.rules.primary} by {column}": own for column, own in found.slices.items()}}
    for title, rows in tables.items():
        table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold", min_width=8)
        for name in ("rows", "A", "B", "B less A", f"{found.rules.level:.0%} interval, always valid", "p, corrected"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, own in rows.items():
            interval = f"{own.always.low:+.5f} to {own.always.high:+.5f}"
            figures = (f"{own.num_rows:,}", number(own.a, 5), number(own.b, 5), f"{own.fixed.value:+.5f}", interval, f"{own.adjusted:.3g}")
            table.add_row(Text(str(name)), *figures)
        console.print(table)
    guardrails = Table(title="guardrails", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "found", "allowed", "verdict"):
        guardrails.add_column(name, justify="right" if name == "found" else "left")
    for bound in found.guardrails:
        guardrails.add_row(Text(bound.name), number(bound.found), bound.allowed, "PASS" if bound.passed else "FAIL")
    console.print(guardrails)
    for name, columns in found.compared.absent.items():
        if columns:
            console.print(
                f"model {name.upper()} reads columns that the log does not have, at their defaults: {', '.join(columns)}", markup=False
            )
    console.print(found.sentence(), markup=False, soft_wrap=True)
    console.print("LAUNCH" if found.launch else "DO NOT LAUNCH on this evidence")
