"""`ninerank doctor`: what this machine can run, what is missing, and the line that mends it."""

import json
import platform
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from ninerank import __version__
from ninerank.cli import environment


def run(
    device: Annotated[str, typer.Option(help="Device that must run: auto, cpu, cuda[:i] or npu[:i].")] = "auto",
    redis: Annotated[str | None, typer.Option(help="URL of a Redis that must answer, such as redis://localhost:6379/0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine can run, what is missing, and the line that mends it.

    Exit code 1 if the device (or the Redis) that was asked for cannot run.
    """
    findings = environment.Findings()
    findings.sections["this"] = {"ninerank": __version__, "python": platform.python_version(), "platform": platform.platform()}
    environment.devices(findings, device)
    chosen = findings.sections.get("chosen", {}).get("name", device).partition(":")[0]
    environment.packages(findings, chosen if chosen in ("cuda", "npu") else "cpu")
    environment.drivers(findings)
    environment.compilers(findings)
    if redis is not None:
        environment.redis(findings, redis)
    if as_json:
        print(
            json.dumps({**findings.sections, "problems": [asdict(problem) for problem in findings.problems], "ok": findings.ok}, indent=2)
        )
    else:
        _show(findings)
    if not findings.ok:
        sys.exit(1)


def _show(findings: environment.Findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for title, section in findings.sections.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
        for key, value in section.items():
            table.add_row(f"  {key}", escape(_phrase(value)))
        console.print(table if section else f"[bold]{title}[/bold]\n  none found")
    if not findings.problems:
        console.print("\n[green]Nothing is missing.[/green]")
        return
    console.print("\n[bold]what is missing or wrong[/bold]")
    for problem in findings.problems:
        colour = "red" if problem.fatal else "yellow"
        console.print(f"[{colour}]*[/{colour}] {escape(problem.what)}\n    {escape(problem.mend)}", soft_wrap=True)


def _phrase(value: object) -> str:
    if not isinstance(value, dict):
        return "-" if value is None else str(value)
    if "version" in value and "wanted" in value:
        mark = "ok" if value["ok"] and value.get("loads", True) else "MISSING" if value["version"] is None else "WRONG"
        return f"{value['version'] or '-':16} {mark:8} {value['wanted']}"
    if "why_not" in value:
        return "runs" if value["ok"] else f"no: {value['why_not']}"
    return ", ".join(f"{key} {inner}" for key, inner in value.items())
