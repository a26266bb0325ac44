"""`ninerank evaluate RUN|BUNDLE DATA`: metrics of a model on log files, as a table, JSON and a page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.evaluate import Evaluation

FORMATS = "auto, csv, tsv, parquet, arrow, criteo or libsvm"


def run(
    model: Annotated[Path, typer.Argument(help="Directory of a training run or of a bundle.", show_default=False)],
    data: Annotated[list[Path], typer.Argument(help="Log files, or directories of them, with labels.", show_default=False)],
    slices: Annotated[list[str] | None, typer.Option("--slice", help="Column to break the metrics down by; may be repeated.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write one self-contained HTML page here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
    max_values: Annotated[int, typer.Option(help="Values shown of each sliced column, the rest are joined.", min=1)] = 25,
    data_format: Annotated[str, typer.Option("--format", help=f"Format of the files: {FORMATS}.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Rows scored at a time.", min=1)] = 8192,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda[:i] or npu[:i].")] = "auto",
) -> None:
    """Measure a trained run or a bundle on log files: AUC, log loss, calibration, whole and by slice."""
    from ninerank.cli.progress import progress_bar
    from ninerank.evaluation.evaluate import evaluate
    from ninerank.evaluation.page import check_writable, write_text
    from ninerank.evaluation.report import evaluation_page
    from ninerank.evaluation.scorer import open_scorer
    from ninerank.features.reader import Reader

    check_writable(out)
    check_writable(report)
    scorer = open_scorer(model, device)
    columns = tuple(dict.fromkeys(slices or ()))
    reader = Reader(data, format=data_format, spec=scorer.spec, batch_size=batch_size, extra_columns=columns)
    sizes = [size for file in reader.files for size in file.block_rows]
    total = sum(size or 0 for size in sizes) if None not in sizes else None
    with progress_bar("evaluate", total) as on_rows:
        found = evaluate(scorer, reader.epoch(), data=[str(path) for path in data], slices=columns, max_values=max_values, on_rows=on_rows)
    text = json.dumps(found.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    if report is not None:
        write_text(report, evaluation_page(found))
    if as_json:
        print(text)
        return
    _print(found)
    for path in filter(None, (out, report)):
        print(f"wrote {path}")


def _print(found: "Evaluation") -> None:
    from ninerank.cli.tables import output, quality_table

    console = output()
    model = found.model
    speed = f"{found.rows:,} rows, {found.rows / found.seconds:,.0f} rows/s on {model.device}"
    console.print(f"{model.kind} {model.name} {model.version}: {speed}", markup=False)
    for task in found.tasks:
        console.print(quality_table(task.label, {"all": task.summary}))
        for column, own in task.slices.items():
            console.print(quality_table(f"{task.label} by {column}", own))
