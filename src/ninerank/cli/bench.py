"""`ninerank bench serve --target HOST:PORT --rate R | --concurrency C`: how a server holds up under load."""

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.predictor.load import LoadResult

app = typer.Typer()


@app.callback()
def group() -> None:
    """Measure."""


class Send(str, Enum):
    """How candidates are sent."""

    features = "features"
    ids = "ids"


@app.command()
def serve(
    target: Annotated[str, typer.Option(help="Server, as host:port.")],
    bundle: Annotated[Path | None, typer.Option(help="Make requests of this bundle's golden rows.")] = None,
    request: Annotated[Path | None, typer.Option(help="Send this request file (`ninerank rank --example`) again and again.")] = None,
    items: Annotated[Path | None, typer.Option(help="Parquet of items that candidates are drawn from.")] = None,
    item_key: Annotated[str | None, typer.Option(help="Column of item ids.")] = None,
    send: Annotated[Send, typer.Option(help="Candidates with their features, or as ids to be looked up.")] = Send.features,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of a request.")] = 256,
    distinct: Annotated[int, typer.Option(min=1, help="Different requests, drawn from again and again.")] = 1_000,
    skew: Annotated[float, typer.Option(min=0, max=10, help="Zipf exponent by which users and items are drawn; 0: all alike.")] = 1.05,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: requests a second, whether or not the last was answered.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: requests under way at once.")] = None,
    evenly: Annotated[bool, typer.Option("--evenly", help="Open loop: at equal distances, not at random.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to measure.")] = 10.0,
    warmup: Annotated[float, typer.Option(min=0, help="Seconds before that, which do not count.")] = 1.0,
    deadline_ms: Annotated[float, typer.Option(min=0.1, help="Of each call; a later answer does not count as served.")] = 1000.0,
    channels: Annotated[int, typer.Option(min=1, max=256, help="Connections.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and draws.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
) -> None:
    """Load a server and print latencies, answers a second and statuses. Scores of the first answer are checked before."""
    if (bundle is None) == (request is None):
        raise typer.BadParameter("give one of --bundle and --request", param_hint="--bundle / --request")
    from ninerank.cli.progress import progress_bar
    from ninerank.evaluation.loadpage import load_page
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.predictor.load import LoadConfig, run_load
    from ninerank.predictor.workload import Workload, requests_of_bundle, requests_of_file

    check_writable(out)
    check_writable(report)
    given = {"rate": rate, "concurrency": concurrency, "evenly": evenly, "seconds": seconds, "warmup_s": warmup}
    config = LoadConfig.parse({**given, "deadline_ms": deadline_ms, "channels": channels, "seed": seed}, "bench serve")
    if bundle is not None:
        workload = {"num_requests": distinct, "candidates": candidates, "skew": skew, "send": send.value, "seed": seed}
        made = requests_of_bundle(bundle, Workload.parse(workload, "bench serve"), items=items, item_key=item_key)
    else:
        made = requests_of_file(request or Path())
    with progress_bar("load", round(seconds + warmup), "s") as on_second:
        found = run_load(target, made, config, on_second=on_second)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False)
    if out is not None:
        write_text(out, text + "\n")
    if report is not None:
        write_text(report, load_page(target, found))
    if as_json:
        print(text)
        return
    _print(target, found)
    for path in filter(None, (out, report)):
        print(f"wrote {path}")


def _print(target: str, found: "LoadResult") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ninerank.cli.tables import number, output
    from ninerank.predictor.load import PERCENTILES

    console, config = output(), found.config
    loop = f"{config.rate:g} requests/s (open loop)" if config.rate is not None else f"{config.concurrency} at once (closed loop)"
    table = Table(title=f"{target}: {loop}, {found.seconds:g} s", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("answers/s", *(f"p{percent:g} ms" for percent in PERCENTILES[:-1]), "max ms"):
        table.add_column(name, justify="right")
    table.add_row(f"{found.requests_per_s:,.1f}", *(number(found.percentile_ms(percent), 2) for percent in PERCENTILES))
    console.print(table)
    console.print("statuses: " + ", ".join(f"{name} {count:,}" for name, count in sorted(found.statuses.items())), markup=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
