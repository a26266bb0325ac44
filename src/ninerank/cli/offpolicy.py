"""`ninerank offpolicy LOG --policy P`: what another policy would have earned, from a log with propensities."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.offpolicy import Valuation
    from ninerank.metrics import Interval


def run(
    log: Annotated[
        list[Path], typer.Argument(help="Decision logs (Parquet, Arrow, CSV, TSV), or directories of them.", show_default=False)
    ],
    policy: Annotated[
        str,
        typer.Option(
            help="Policy to value: logging, uniform, log:PATH (shares of actions in another log), column:NAME (its probabilities)."
        ),
    ] = "logging",
    columns: Annotated[Path | None, typer.Option(help="YAML file that names the columns: reward, action, propensity, ...")] = None,
    data_format: Annotated[str, typer.Option("--format", help="columns (as --columns or the defaults say) or openbandit.")] = "columns",
    model: Annotated[bool, typer.Option(help="Estimate with a reward model as well: DM, DR and their kin.")] = True,
    clip: Annotated[float, typer.Option(help="Largest weight of clipped IPS, and threshold of switch-DR.", min=0)] = 10.0,
    shrinkage: Annotated[float, typer.Option(help="Lambda of DRos.", min=0)] = 100.0,
    level: Annotated[float, typer.Option(help="Confidence level.", min=0.5, max=0.9999)] = 0.95,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
) -> None:
    """Value a policy that did not serve, with intervals and warnings, from the log of one that did."""
    from ninerank.errors import DataError, nearest
    from ninerank.evaluation.offpolicy.estimators import DR, IPS, SNDR, SNIPS, ClippedIPS, DirectMethod, DRos, SwitchDR
    from ninerank.evaluation.offpolicy.logs import OPEN_BANDIT, DecisionColumns, Target, question_of, read_decisions
    from ninerank.evaluation.offpolicy.valuation import OffPolicy
    from ninerank.evaluation.page import check_writable, write_text

    check_writable(out)
    target = Target.parse(policy)
    if data_format not in ("columns", "openbandit"):
        raise DataError(f"format {data_format!r}; {nearest(data_format, ('columns', 'openbandit'))}")
    if data_format == "openbandit" and columns is not None:
        raise DataError("--format openbandit names the columns itself: leave out --columns")
    mapping = OPEN_BANDIT if data_format == "openbandit" else DecisionColumns() if columns is None else DecisionColumns.load(columns)
    rows = read_decisions(log, mapping, target.of if target.kind == "column" else None)
    asked = question_of(rows, target, mapping, with_model=model)
    estimators = (IPS(), ClippedIPS(clip), SNIPS(), DirectMethod(), DR(), SNDR(), SwitchDR(clip), DRos(shrinkage))
    found = OffPolicy(estimators, level).update(asked.feedback, asked.unsupported_N).value()
    text = json.dumps(
        {"log": [str(path) for path in log], "policy": policy, "level": level, **found.as_dict(), "caveats": asked.caveats},
        indent=1,
        allow_nan=False,
    )
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
        return
    _print(found, policy, asked.caveats)
    if out is not None:
        print(f"wrote {out}")


def _print(found: "Valuation", policy: str, caveats: tuple[str, ...]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ninerank.cli.tables import output

    console, own = output(), found.diagnostics
    level = f"{found.logged.level:.4g}"
    table = Table(title=f"value of policy {policy}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("estimator")
    for name in ("value", f"interval at {level}", "lift over the log", f"interval at {level}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("logged", *_numbers(found.logged), "", "")
    for name, value in found.estimates.items():
        table.add_row(name, *_numbers(value), *_numbers(found.lifts[name], signed=True))
    console.print(table)
    console.print(
        f"{own.decisions:,} decisions in {own.clusters:,} clusters; effective size {own.effective_size:,.0f} ({own.effective_share:.1%}); "
        f"largest weight {own.largest_weight:.4g}; mean weight {own.mean_weight.value:.4g}; "
        f"smallest propensity {own.smallest_propensity:.3g}; {own.rewarded:,} rewarded",
        markup=False,
    )
    for line in (*own.warnings, *caveats):
        console.print(f"warning: {line}", markup=False)


def _numbers(value: "Interval", *, signed: bool = False) -> tuple[str, str]:
    import math

    if math.isnan(value.value):
        return "-", "-"
    form = "+.5f" if signed else ".5f"
    return f"{value.value:{form}}", "-" if math.isnan(value.low) else f"{value.low:{form}} to {value.high:{form}}"
