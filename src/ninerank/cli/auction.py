"""`ninerank auction LOG`: ad auctions held again with another model, pricing or reserve."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ninerank.evaluation.auction import AdvertiserRow, ReplayedAuction
    from ninerank.metrics import Interval


def run(
    log: Annotated[list[Path], typer.Argument(help="Auction logs (Parquet, Arrow, CSV, TSV), or folders of them.", show_default=False)],
    columns: Annotated[Path | None, typer.Option(help="YAML file that names the columns: auction, advertiser, bid, score, ...")] = None,
    rule: Annotated[Path | None, typer.Option(help="YAML file of the baseline's rule: pricing, reserve_ecpm, places.")] = None,
    other_rule: Annotated[Path | None, typer.Option(help="The other side's rule; the baseline's if not given.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Make scores true by the clicks logged at place 0 first.")] = False,
    top: Annotated[int, typer.Option(help="Advertisers shown, those of the largest revenue.", min=0)] = 20,
    out: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and not a table.")] = False,
) -> None:
    """Hold the auctions of a log again by two sides' scores or rules: revenue, clicks, and who wins how often."""
    from ninerank.evaluation.auction import AuctionRule
    from ninerank.evaluation.auctionlog import AuctionColumns, read_auctions, replay_auctions
    from ninerank.evaluation.page import check_writable, write_text

    check_writable(out)
    baseline = AuctionRule() if rule is None else AuctionRule.load(rule)
    other = None if other_rule is None else AuctionRule.load(other_rule)
    auctions = read_auctions(log, AuctionColumns() if columns is None else AuctionColumns.load(columns))
    found = replay_auctions(auctions, baseline, other, calibrate=calibrate).value()
    text = json.dumps(_plain(found, auctions.advertisers), indent=1, allow_nan=False, ensure_ascii=False)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        print(text)
        return
    _print(found, auctions.advertisers, top)
    if out is not None:
        print(f"wrote {out}")


def _plain(found: "ReplayedAuction", advertisers: list[str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in found._asdict().items():
        if name == "advertisers":
            pairs = {advertisers[key]: pair for key, pair in value.items()}
            plain[name] = {key: {"baseline": own._asdict(), "other": other._asdict()} for key, (own, other) in pairs.items()}
        elif hasattr(value, "_asdict"):
            plain[name] = {key: number if number == number else None for key, number in value._asdict().items()}  # noqa: PLR0124 - nan
        else:
            plain[name] = value
    return plain


def _print(found: "ReplayedAuction", advertisers: list[str], top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ninerank.cli.tables import output

    console = output()
    share = found.changed_share
    console.print(f"{found.auctions:,} auctions; winners change in {share.value:.2%} ({share.low:.2%} to {share.high:.2%})", markup=False)
    table = Table(title="an auction", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "baseline", "other", "difference", "interval at 0.95"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_row("revenue", *_numbers(found.revenue, found.other_revenue, found.revenue_difference))
    table.add_row("clicks", *_numbers(found.clicks, found.other_clicks, found.clicks_difference))
    console.print(table)
    if found.logged_winner_share is not None and found.logged_clicks is not None and found.logged_revenue is not None:
        console.print(
            f"the log: {found.logged_winner_share:.1%} of its winners are the baseline's; clicks {found.logged_clicks.value:.5g}, "
            f"revenue {found.logged_revenue.value:.5g} an auction",
            markup=False,
        )
    table = Table(title="by advertiser", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "auctions", "won", "other", "clicks", "other", "revenue", "other"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    by_revenue = sorted(found.advertisers.items(), key=lambda item: -max(side.revenue for side in item[1]))
    for key, (own, other) in by_revenue[:top]:
        table.add_row(Text(advertisers[key]), f"{own.auctions:,}", *_columns(own, other))
    if top:
        console.print(table)


def _numbers(own: "Interval", other: "Interval", difference: "Interval") -> tuple[str, ...]:
    return f"{own.value:.5g}", f"{other.value:.5g}", f"{difference.value:+.4g}", f"{difference.low:+.4g} to {difference.high:+.4g}"


def _columns(own: "AdvertiserRow", other: "AdvertiserRow") -> list[str]:
    shares = [f"{side.win_rate:.1%}" for side in (own, other)]
    return [*shares, *(f"{side.clicks:,.1f}" for side in (own, other)), *(f"{side.revenue:,.2f}" for side in (own, other))]
