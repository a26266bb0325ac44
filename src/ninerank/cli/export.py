"""`ninerank export`: a run becomes a bundle. The one place that knows both training and serving."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ninerank.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from ninerank.training.run import Run


def run(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that `ninerank train` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory to make; it must not exist.")],
    version: Annotated[str | None, typer.Option(help="Version of the model; default: the time, as 20260131-093000.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; default: that of the recipe's model.")] = None,
    golden: Annotated[Path | None, typer.Option(help="Log file of golden rows; default: the run's validation data.")] = None,
    golden_rows: Annotated[int, typer.Option(min=1, max=100_000, help="Number of golden rows.")] = 256,
    tables: Annotated[
        str, typer.Option(metavar="[fp32|fp16|int8|int4]", help="What embedding tables are stored in; dims too small for codes in fp16.")
    ] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write a trained run as a bundle: spec, dense graph, tables, golden rows with their scores, checksums."""
    from rich.console import Console

    from ninerank.embedding.quantize import check_dtype
    from ninerank.predictor.bundle import export_bundle
    from ninerank.training.run import load_run

    check_dtype(tables)
    console = Console(stderr=True)
    with console.status("loading the run") as status:
        trained = load_run(run_dir)
        status.update("reading golden rows")
        manifest = export_bundle(
            trained.model,
            trained.spec,
            _golden(trained, golden, golden_rows),
            out,
            model_name=name or trained.recipe.model.name,
            version=version or f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}",
            tables=tables,
            progress=status.update,
        )
    if as_json:
        print(json.dumps(manifest.model_dump(mode="json"), indent=1))
        return
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    print(f"bundle {out}: {manifest.model_name} {manifest.model_version}, {len(manifest.files)} files, {size_bytes / 1e6:,.1f} MB")
    if tables != "fp32":
        stored = ", ".join(f"{group} {dtype}" for group, dtype in manifest.table_dtypes.items())
        print(f"tables in {stored}: golden scores move by at most {manifest.golden_difference:.2g}")


def _golden(trained: "Run", file: Path | None, count: int) -> "pa.RecordBatch":
    """The first rows of the validation data, or of `file`, in the format of the run's data."""
    from ninerank.features.reader import Reader

    data = trained.recipe.data
    paths = data.files("valid") if file is None else (file,)
    reader = Reader(paths, format=data.format if file is None else "auto", spec=trained.spec, batch_size=count)
    rows: pa.RecordBatch | None = next(iter(reader.epoch(0)), None)
    if rows is None or rows.num_rows == 0:
        raise DataError(f"{paths[0]}: holds no rows to take golden rows from")
    return rows
