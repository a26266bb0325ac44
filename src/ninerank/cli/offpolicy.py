"""`ninerank offpolicy LOG --policy P`: what another policy would have earned, from a log with propensities."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.offpolicy import Valuation
    from ninerank.evaluation.offpolicy.slates import Slates
    from ninerank.metrics import Interval

# By what the probabilities of a place are: the estimators that they serve.
LIST_ESTIMATORS = {
    "place": ("item_position", "pseudo_inverse"),
    "given-above": ("independent", "cascade", "reward_interaction", "standard"),
}


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
    data_format: Annotated[
        str, typer.Option("--format", help="columns (as --columns or the defaults say), joined (of `ninerank join`) or openbandit.")
    ] = "columns",
    reward: Annotated[str | None, typer.Option(help="Column of the reward, in place of the mapped one.")] = None,
    lists: Annotated[
        str | None,
        typer.Option(help="Rows are places of lists; their probabilities are: place (the item stands there at all) or given-above."),
    ] = None,
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
    from ninerank.evaluation.offpolicy.logs import FORMATS, DecisionColumns, read_decisions
    from ninerank.evaluation.offpolicy.targets import Target, lists_for, question_of
    from ninerank.evaluation.offpolicy.valuation import OffPolicy
    from ninerank.evaluation.page import check_writable, write_text

    check_writable(out)
    target = Target.parse(policy)
    if data_format not in FORMATS:
        raise DataError(f"format {data_format!r}; {nearest(data_format, FORMATS)}")
    if data_format != "columns" and columns is not None:
        raise DataError(f"--format {data_format} names the columns itself: leave out --columns")
    if lists not in (None, *LIST_ESTIMATORS):
        raise DataError(f"lists {lists!r}; {nearest(str(lists), LIST_ESTIMATORS)}")
    mapping = FORMATS[data_format] if columns is None else DecisionColumns.load(columns)
    if reward is not None:
        mapping = mapping.model_copy(update={"reward": reward})
    rows = read_decisions(log, mapping, target.of if target.kind == "column" else None)
    if lists is not None:
        _value_lists(lists_for(rows, target), lists, policy, level, out, as_json=as_json)
        return
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


def _value_lists(rows: "Slates", lists: str, policy: str, level: float, out: Path | None, *, as_json: bool) -> None:
    from ninerank.evaluation.offpolicy.slates import slate_value
    from ninerank.evaluation.page import write_text

    found = {name: slate_value(rows, name, level=level) for name in LIST_ESTIMATORS[lists]}
    numbers = {name: {key: number if number == number else None for key, number in own._asdict().items()} for name, own in found.items()}  # noqa: PLR0124
    text = json.dumps({"policy": policy, "lists": len(rows.reward_LK), "estimates": numbers}, indent=1, allow_nan=False)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ninerank.cli.tables import output

    title = f"reward of a list under policy {policy}, {len(rows.reward_LK):,} lists"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("estimator")
    for name in ("value", f"interval at {level:.4g}"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, own in found.items():
        table.add_row(name, *_numbers(own))
    output().print(table)


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
