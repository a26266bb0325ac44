"""`ninerank features`: fit, show and check feature specs, print their JSON Schema, draw a synthetic log."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pyarrow as pa

    from ninerank.features.reader import Reader
    from ninerank.features.spec import FeatureSpec, TableSpec

app = typer.Typer()

FORMATS = "auto, csv, tsv, parquet, arrow, criteo or libsvm"
Spec = Annotated[Path, typer.Argument(help="Feature spec, YAML or JSON.", show_default=False)]
Data = Annotated[list[Path], typer.Argument(help="Log files, or directories of them.", show_default=False)]
Format = Annotated[str, typer.Option("--format", help=f"Format of the files: {FORMATS}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")]
ROWS_PER_BATCH = 1 << 16


@app.command("fit")
def fit_spec(
    spec: Spec,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the fitted spec: .json (large vocabularies) or .yaml.")],
    rows: Annotated[int | None, typer.Option(help="Fit on the first so many rows only.", min=1)] = None,
    data_format: Format = "auto",
) -> None:
    """Learn vocabularies, moments and bucket boundaries from log files, and write the fitted spec."""
    from ninerank.evaluation.page import check_writable
    from ninerank.features.fit import Fitter
    from ninerank.features.spec import FeatureSpec

    loaded = FeatureSpec.load(spec)
    loaded.check_suffix(out)
    check_writable(out)
    fitter = Fitter(loaded)
    for batch in _batches(_reader(loaded, data, data_format), rows, "fit"):
        fitter.update(batch)
    fitted = fitter.finish()
    fitted.save(out)
    print(f"fitted on {fitter.num_rows:,} rows, digest {fitted.digest}")
    print(f"wrote {out}")


@app.command("show")
def show(spec: Spec, as_json: AsJson = False) -> None:
    """List a spec's features and tables, its digest, and what is not fitted yet."""
    from ninerank.features.spec import FeatureSpec

    loaded = FeatureSpec.load(spec)
    if as_json:
        print(json.dumps(_description(loaded), indent=1, ensure_ascii=False))
    else:
        _print_spec(loaded)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a feature spec, for editors and other tools."""
    from ninerank.features.spec import FeatureSpec

    print(json.dumps(FeatureSpec.model_json_schema(), indent=1))


@app.command("check")
def check(
    spec: Spec,
    data: Data,
    rows: Annotated[int | None, typer.Option(help="Check the first so many rows only.", min=1)] = None,
    data_format: Format = "auto",
    as_json: AsJson = False,
) -> None:
    """Read log files as a spec says and report what it finds: missing and unknown values by feature, positives by label.

    Ends with an error at the first value that training would refuse.
    """
    from ninerank.features.profile import Profile
    from ninerank.features.spec import FeatureSpec

    loaded = FeatureSpec.load(spec)
    profile = Profile(loaded)
    for batch in _batches(_reader(loaded, data, data_format), rows, "check"):
        profile.update(batch)
    if as_json:
        print(json.dumps(profile.as_dict(), indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    from ninerank.cli.tables import output

    found = profile.as_dict()
    table = Table(title=f"{found['num_rows']:,} rows", title_justify="left")
    for heading in ("feature", "kind", "column", "missing", "unknown", "range or mean length"):
        table.add_column(heading, justify="left" if heading in {"feature", "kind", "column"} else "right")
    for name, own in found["features"].items():
        unknown = "-" if own["unknown_share"] is None else f"{own['unknown_share']:.2%}"
        extent = f"{own['min']:g} .. {own['max']:g}" if "min" in own else f"{own['mean_length']:.1f}" if "mean_length" in own else ""
        table.add_row(name, own["kind"], own["column"], f"{own['missing_share']:.2%}", unknown, extent)
    console = output()
    console.print(table)
    for label, rate in found["positive_rate"].items():
        console.print(f"label {label}: {rate:.3%} positive", markup=False)
    if not loaded.is_fitted:
        console.print("the spec is not fitted: unknown ids were not counted")


@app.command("synthetic")
def synthetic(
    out: Annotated[Path, typer.Argument(help="Directory to write the log into.", show_default=False)],
    config: Annotated[Path | None, typer.Option(help="Settings of the log, YAML or JSON; options below override them.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of all splits together.", min=1)] = None,
    users: Annotated[int | None, typer.Option(help="Number of users.", min=1)] = None,
    items: Annotated[int | None, typer.Option(help="Number of items.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed: another one is another world.", min=0)] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a click log from a known truth: train, valid and test Parquet, items, spec, and the best AUC that any model can reach."""
    from rich.table import Table

    from ninerank.cli.progress import progress_bar
    from ninerank.cli.tables import number, output
    from ninerank.config import read_mapping
    from ninerank.features.sources.synthetic import SyntheticConfig, generate

    given = {"num_rows": rows, "num_users": users, "num_items": items, "seed": seed}
    settings = {**(read_mapping(config) if config else {}), **{key: value for key, value in given.items() if value is not None}}
    chosen = SyntheticConfig.parse(settings, str(config or "synthetic"))
    with progress_bar("draw", chosen.num_requests * chosen.candidates_per_request) as on_rows:
        truth = generate(chosen, out, progress=on_rows)
    if as_json:
        print((out / "truth.json").read_text(encoding="utf-8"), end="")
        return
    table = Table(title="the best possible on this log", title_justify="left")
    for heading in ("", "rows", "positives", "Bayes AUC", "Bayes log loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, split in truth.splits.items():
        shares = f"{split.num_rows:,}", f"{split.positive_rate:.2%}"
        table.add_row(name, *shares, number(split.bayes_auc), number(split.bayes_logloss))
    output().print(table)
    print(f"wrote {out}")


def _reader(spec: "FeatureSpec", data: list[Path], data_format: str) -> "Reader":
    from ninerank.features.reader import Reader

    return Reader(data, format=data_format, spec=spec, batch_size=ROWS_PER_BATCH)


def _batches(reader: "Reader", rows: int | None, label: str) -> "Iterator[pa.RecordBatch]":
    """The first `rows` rows, with a progress bar."""
    from ninerank.cli.progress import progress_bar

    left = rows
    with progress_bar(label, rows or reader.known_rows) as on_rows:
        for batch in reader.epoch():
            kept = batch if left is None else batch.slice(0, left)
            yield kept
            on_rows(kept.num_rows)
            if left is not None:
                left -= kept.num_rows
                if left <= 0:
                    return


def _description(spec: "FeatureSpec") -> dict[str, Any]:
    from ninerank.features.spec import NumericFeature, SequenceFeature

    features = {}
    for feature in spec.features:
        own: dict[str, Any] = {"kind": feature.kind, "role": feature.role, "column": feature.column}
        if isinstance(feature, SequenceFeature):
            own |= {"of": feature.of, "max_length": feature.max_length}
        else:
            own |= {"fitted": feature.is_fitted}
            own |= {"transform": feature.transform.kind} if isinstance(feature, NumericFeature) else {"encoding": feature.encoding.kind}
        features[feature.name] = own
    tables = {name: _table(table) for name, table in spec.tables.items()} if spec.is_fitted else None
    answers = {"labels": list(spec.labels), "weight": spec.weight, "group": spec.group}
    return {"digest": spec.digest, "fitted": spec.is_fitted, **answers, "features": features, "tables": tables}


def _table(table: "TableSpec") -> dict[str, Any]:
    return {"num_rows": table.num_rows, "dynamic": table.is_dynamic, "features": list(table.features)}


def _size(table: dict[str, Any]) -> str:
    return "dynamic" if table["dynamic"] else f"{table['num_rows']:,}"


def _print_spec(spec: "FeatureSpec") -> None:
    from rich.table import Table

    from ninerank.cli.tables import output

    found = _description(spec)
    table = Table()
    for heading in ("feature", "role", "kind", "column", "what becomes of it", "table", "rows"):
        table.add_column(heading, justify="right" if heading == "rows" else "left")
    for name, own in found["features"].items():
        into = spec.table_of(name)
        rows = "" if into is None else _size(found["tables"][into]) if found["tables"] else "not fitted"
        what = own.get("encoding") or own.get("transform") or f"last {own['max_length']} of {own['of']}"
        table.add_row(name, own["role"], own["kind"], own["column"], what, into or "", rows)
    console = output()
    console.print(table)
    console.print(f"labels {', '.join(spec.labels)}; weight {spec.weight or '-'}; group {spec.group or '-'}", markup=False)
    console.print(f"digest {spec.digest}" + ("" if spec.is_fitted else " (not fitted)"), markup=False)
