"""`ninerank fuse BUNDLE`: what the graph compiler made of a bundle's graph."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.fusion import FusionReport


def run(
    bundle_dir: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle directory that `ninerank export` wrote.")],
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here, both graphs drawn.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
) -> None:
    """Show what the graph compiler did: passes that fired or were withdrawn and why, work before and after."""
    from ninerank.evaluation.fusion import fusion_page, fusion_report
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.predictor.bundle import Bundle

    check_writable(report)
    check_writable(out)
    found = fusion_report(Bundle.load(bundle_dir))
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    if report is not None:
        write_text(report, fusion_page(found))
    if as_json:
        print(text)
        return
    _print(found)
    for path in filter(None, (report, out)):
        print(f"wrote {path}")


def _print(found: "FusionReport") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ninerank.evaluation.fusion import cost_line

    manifest = found.manifest
    print(f"{manifest.model_name} {manifest.model_version}, one request with 256 candidates")
    print(f"before: {cost_line(manifest.graph_before)}, {found.milliseconds_before:.2f} ms eager")
    print(f"after:  {cost_line(manifest.graph_after)}, {found.milliseconds_after:.2f} ms eager")
    table = Table(box=None, pad_edge=False)
    for head, side in (("pass", "left"), ("round", "right"), ("fired", "right"), ("launches", "right"), ("outcome", "left")):
        table.add_column(head, justify="right" if side == "right" else "left")
    for record in found.records:
        launches = f"{record.before.launches} -> {record.after.launches}" if record.fired else ""
        outcome = f"withdrawn: {record.why}" if record.withdrawn else record.why or "kept"
        table.add_row(record.name, str(record.round or ""), str(record.fired or ""), launches, escape(outcome))
    Console().print(table)
