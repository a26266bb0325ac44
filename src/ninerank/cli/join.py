"""`ninerank join LOG --labels F --label click --out DIR`: a request log with the labels that came later, one row a candidate."""

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    log: Annotated[Path, typer.Argument(help="Request log: a file or a folder of them.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder: date=YYYY-MM-DD/*.parquet, one row a candidate.")],
    labels: Annotated[list[Path] | None, typer.Option(help="Parquet files of labels, or folders of them; may be repeated.")] = None,
    label: Annotated[str, typer.Option(help="What the label is called in the result.")] = "label",
    label_column: Annotated[str | None, typer.Option(help="Column of 0 and 1; without it every row is a 1 (a stream of clicks).")] = None,
    time: Annotated[str | None, typer.Option(help="Column of times: a timestamp, or microseconds since 1970.")] = None,
    window: Annotated[float | None, typer.Option(help="Seconds after the request in which a label counts.", min=1e-6)] = None,
    streams: Annotated[
        Path | None, typer.Option(help="YAML with several streams of labels and their columns, in place of --labels.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Logged feature to carry along; may be repeated.")] = None,
    processes: Annotated[int, typer.Option(help="Processes at once.", min=1, max=256)] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="On the Ray cluster of RAY_ADDRESS, and not in processes of this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Join clicks and conversions to a served log by request and candidate, in bounded memory."""
    from ninerank.cli.progress import progress_bar
    from ninerank.evaluation.join import join_log, read_streams, stream_of

    if (labels is None) == (streams is None):
        raise typer.BadParameter("give one of --labels and --streams", param_hint="--labels / --streams")
    if streams is not None:
        given = read_streams(streams)
    else:
        given = (stream_of(labels or [], label, label_column, time, window),)
    with progress_bar("join", None, "parts") as advance:
        counts = join_log(
            log,
            given,
            out,
            keep=keep or (),
            processes=processes,
            where="ray" if ray else "local",
            on_part=lambda _done, _total: advance(1),
        )
    if as_json:
        print(json.dumps(counts.as_dict()))
        return
    from ninerank.cli.tables import output

    console = output()
    for name, value in counts.as_dict().items():
        shown = ", ".join(f"{label} {count:,}" for label, count in value.items()) if isinstance(value, dict) else f"{value:,}"
        console.print(f"{name:11} {shown}", markup=False)
    console.print(f"wrote {out}", markup=False)
