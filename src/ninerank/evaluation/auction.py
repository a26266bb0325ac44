"""Ad auctions held again: who would have won, at what price, with other scores, another pricing or another reserve.

Candidates of a request rank by eCPM = 1000 * bid * pCTR, pCTR calibrated (`metrics.Recalibration`). The best K above the reserve win
the K places; a click costs

    first price    the bid
    second price   what keeps the place: eCPM of the next one below, or the reserve, over 1000 pCTR (generalised second price,
                   Edelman, Ostrovsky & Schwarz 2007)

Clicks of ads that were never shown cannot be counted: they are expected, from `chance_N` (the best calibrated pCTR at hand,
the same for all rules that are compared) times the examination of the place. Held under the rule that served, with its own scores, the
simulation is checked against the log: `AuctionReplay` tells how many winners and how much revenue and clicks agree.

Shape legend: N candidates, A advertisers, K places.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field
from typing_extensions import Self

from ninerank.config import Config
from ninerank.errors import DataError
from ninerank.metrics.accumulator import Accumulator, State, ratio, under
from ninerank.metrics.clusters import ClusterSums
from ninerank.metrics.intervals import Interval
from ninerank.metrics.rows import Array, check_groups

__all__ = ["AdvertiserRow", "AuctionReplay", "AuctionRule", "Candidates", "Outcome", "ReplayedAuction", "hold"]


class AuctionRule(Config):
    """pricing: first or second. reserve_ecpm: candidates below win nothing. places: chance that each is looked at, the first one 1."""

    pricing: Literal["first", "second"] = "second"
    reserve_ecpm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    places: tuple[float, ...] = Field(default=(1.0,), min_length=1)


@dataclass(frozen=True)
class Candidates:
    """Candidates of auctions, one row each: int64 (N,) auction and advertiser, float64 (N,) bids a click >= 0."""

    auction_N: Array
    advertiser_N: Array
    bid_N: Array

    @classmethod
    def of(cls, auction_N: ArrayLike, advertiser_N: ArrayLike, bid_N: ArrayLike) -> Self:
        """Check columns; raises DataError for keys that are no integers and bids that are no amounts."""
        bids = np.asarray(bid_N, np.float64)
        if bids.ndim != 1 or not (np.isfinite(bids) & (bids >= 0)).all():
            raise DataError(f"bids of shape {bids.shape}: one finite amount >= 0 a candidate is needed")
        return cls(check_groups(auction_N, len(bids), what="auctions"), check_groups(advertiser_N, len(bids), what="advertisers"), bids)


class Outcome(NamedTuple):
    """place_N: int64 place won, from 0, -1 for losers. price_N: cost of a click, 0 for losers. click_N, revenue_N: expected."""

    place_N: Array
    price_N: Array
    click_N: Array
    revenue_N: Array


def hold(candidates: Candidates, score_N: ArrayLike, rule: AuctionRule, chance_N: ArrayLike | None = None) -> Outcome:
    """Hold each auction by the scores. chance_N: probability of a click when looked at, by which clicks are expected; score_N if None.

    Ties go to the earlier row. A candidate of eCPM 0 wins nothing. Raises DataError for scores or chances outside [0, 1].
    """
    score = _chances("scores", score_N, len(candidates.bid_N))
    chance = score if chance_N is None else _chances("chances", chance_N, len(score))
    ecpm = 1000 * candidates.bid_N * score
    order = np.lexsort((-ecpm, candidates.auction_N))
    auction, sorted_ecpm = candidates.auction_N[order], ecpm[order]
    is_first = np.concatenate([[True], auction[1:] != auction[:-1]]) if len(order) else np.empty(0, bool)
    start = np.flatnonzero(is_first)
    rank = np.arange(len(order)) - start[np.cumsum(is_first) - 1] if len(order) else np.empty(0, np.int64)
    wins = (rank < len(rule.places)) & (sorted_ecpm >= rule.reserve_ecpm) & (sorted_ecpm > 0)
    if rule.pricing == "first":
        price = candidates.bid_N[order]
    else:
        below = np.where(np.concatenate([is_first[1:], [True]]), 0.0, np.concatenate([sorted_ecpm[1:], [0.0]]))[: len(order)]
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.maximum(below, rule.reserve_ecpm) / (1000 * score[order])
        price = np.minimum(price, candidates.bid_N[order])  # rounding alone could lift it above
    place_N, price_N = np.full(len(order), -1), np.zeros(len(order))
    place_N[order[wins]], price_N[order[wins]] = rank[wins], price[wins]
    looked = np.array([*rule.places, 0.0])[place_N]  # losers, -1, take the last
    click_N = chance * looked
    return Outcome(place_N, price_N, click_N, click_N * price_N)


class AdvertiserRow(NamedTuple):
    """One advertiser under one rule: auctions entered, auctions won, share of them won, expected clicks and revenue."""

    auctions: int
    wins: int
    win_rate: float
    clicks: float
    revenue: float


class ReplayedAuction(NamedTuple):
    """Per auction, with intervals: revenue and clicks of the baseline, of the other rule, and other - baseline, paired.

    changed_share: auctions whose winners, place by place, differ. advertisers: (baseline, other) of each, by key.
    logged_winner_share: logged winners that the baseline gives the same place; logged_clicks, logged_revenue: of the log, an auction; all
    three None without a log. simulated clicks close to the logged ones say that chances are calibrated where it can be seen.
    """

    auctions: int
    revenue: Interval
    other_revenue: Interval
    revenue_difference: Interval
    clicks: Interval
    other_clicks: Interval
    clicks_difference: Interval
    changed_share: Interval
    advertisers: dict[int, tuple[AdvertiserRow, AdvertiserRow]]
    logged_winner_share: float | None
    logged_clicks: Interval | None
    logged_revenue: Interval | None


# Sums an auction: 1, revenue and clicks of both, changed, logged clicks, logged revenue.
NUM_SUMS = 8


class AuctionReplay(Accumulator):
    """Two rules (or two models' scores under one) held over the same auctions. Auctions must be whole within an update; merges over them.

    >>> ads = Candidates.of([1, 1, 2], [7, 8, 7], [1.0, 2.0, 1.0])
    >>> rule = AuctionRule(pricing="first")
    >>> found = AuctionReplay(rule).update(ads, [0.3, 0.1, 0.2], [0.1, 0.3, 0.2]).value()
    >>> found.auctions, round(found.revenue.value, 3), round(found.other_revenue.value, 3), found.changed_share.value
    (2, 0.25, 0.4, 0.5)
    """

    def __init__(self, rule: AuctionRule, other: AuctionRule | None = None) -> None:
        self.rule, self.other = rule, other or rule
        self._sums = ClusterSums(NUM_SUMS)
        self._agree = np.zeros(2)  # logged winners, those whom the baseline puts at the same place
        self._table: dict[int, Array] = {}  # advertiser -> auctions, then wins, clicks, revenue of both

    def update(
        self,
        candidates: Candidates,
        score_N: ArrayLike,
        other_score_N: ArrayLike,
        *,
        chance_N: ArrayLike | None = None,
        logged_place_N: ArrayLike | None = None,
        logged_click_N: ArrayLike | None = None,
        logged_price_N: ArrayLike | None = None,
    ) -> Self:
        """score_N: of the baseline, other_score_N: of the other. chance_N: see `hold`; each one's own scores if None.

        logged_place_N: place at which the candidate was shown, -1 where it was not; logged_click_N 0 or 1; logged_price_N cost of a click.
        """
        outcomes = (hold(candidates, score_N, self.rule, chance_N), hold(candidates, other_score_N, self.other, chance_N))
        first, second = outcomes
        auctions, at = np.unique(candidates.auction_N, return_inverse=True)
        size = len(auctions)
        changed = np.bincount(at, first.place_N != second.place_N, size) > 0
        logged_click, logged_revenue = np.zeros(len(at)), np.zeros(len(at))
        if logged_place_N is not None:
            place = np.asarray(logged_place_N)
            if place.shape != at.shape:
                raise DataError(f"logged places have shape {place.shape}: {at.shape} is needed, -1 where the candidate was not shown")
            shown = place >= 0
            self._agree += [shown.sum(), (shown & (place == first.place_N)).sum()]
            if logged_click_N is not None:
                logged_click = np.where(shown, np.asarray(logged_click_N, np.float64), 0.0)
                if logged_price_N is not None:
                    logged_revenue = logged_click * np.asarray(logged_price_N, np.float64)
        columns = (first.revenue_N, first.click_N, second.revenue_N, second.click_N)
        totals = [np.bincount(at, column, size) for column in (*columns, logged_click, logged_revenue)]
        self._sums.add(np.stack([np.ones(size), *totals[:4], changed, *totals[4:]]).astype(np.float64))
        self._count_advertisers(candidates, outcomes)
        return self

    def merge(self, other: Self) -> Self:
        self._refuse_other(other)
        if (self.rule, self.other) != (other.rule, other.other):
            raise ValueError("auctions under other rules do not merge")
        self._sums.merge(other._sums)
        self._agree = self._agree + other._agree
        for key, row in other._table.items():
            self._table[key] = self._table.get(key, 0) + row
        return self

    def value(self) -> ReplayedAuction:
        found = [self._sums.interval(partial(_mean, n, None)) for n in range(NUM_SUMS)]
        logged = self._agree[0] > 0
        return ReplayedAuction(
            auctions=self._sums.num_clusters,
            revenue=found[1],
            other_revenue=found[3],
            revenue_difference=self._sums.interval(partial(_mean, 3, 1)),
            clicks=found[2],
            other_clicks=found[4],
            clicks_difference=self._sums.interval(partial(_mean, 4, 2)),
            changed_share=found[5],
            advertisers={key: (_row(row[0], row[1:4]), _row(row[0], row[4:7])) for key, row in sorted(self._table.items())},
            logged_winner_share=float(self._agree[1] / self._agree[0]) if logged else None,
            logged_clicks=found[6] if logged else None,
            logged_revenue=found[7] if logged else None,
        )

    def state(self) -> State:
        keys = sorted(self._table)
        return {
            **{f"sums.{key}": column for key, column in self._sums.state().items()},
            "agree": self._agree.copy(),
            "advertiser": np.array(keys, np.int64),
            "table": np.array([self._table[key] for key in keys], np.float64).reshape(len(keys), 7),
            "rules": np.array([self.rule.canonical_json(), self.other.canonical_json()]),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Array]) -> Self:
        rule, other = (AuctionRule.model_validate_json(str(text)) for text in state["rules"])
        metric = cls(rule, other)
        metric._sums.merge_state(under(state, "sums."))
        metric._agree = np.array(state["agree"], np.float64)
        metric._table = dict(zip(state["advertiser"].tolist(), np.array(state["table"], np.float64), strict=True))
        return metric

    def _count_advertisers(self, candidates: Candidates, outcomes: tuple[Outcome, Outcome]) -> None:
        # An advertiser with several candidates in an auction enters, and wins, it once.
        pair, row_N = np.unique(np.stack([candidates.advertiser_N, candidates.auction_N]), axis=1, return_inverse=True)
        keys, at = np.unique(pair[0], return_inverse=True)
        columns: list[Array] = [np.bincount(at, minlength=len(keys)).astype(np.float64)]
        for own in outcomes:
            won = np.bincount(row_N, own.place_N >= 0, pair.shape[1]) > 0
            clicks, revenue = (np.bincount(row_N, column, pair.shape[1]) for column in (own.click_N, own.revenue_N))
            columns += [np.bincount(at, column, len(keys)) for column in (won, clicks, revenue)]
        for key, row in zip(keys.tolist(), np.stack(columns, axis=1), strict=True):
            self._table[key] = self._table.get(key, 0) + row


def _mean(column: int, less: int | None, sums_SR: Array) -> Array:
    """Mean of a sum over the auctions, less that of another."""
    return ratio(sums_SR[column] if less is None else sums_SR[column] - sums_SR[less], sums_SR[0])


def _row(auctions: float, own: Array) -> AdvertiserRow:
    wins, clicks, revenue = own.tolist()
    return AdvertiserRow(int(auctions), int(wins), wins / auctions, clicks, revenue)


def _chances(what: str, values: ArrayLike, num_rows: int) -> Array:
    column = np.asarray(values, np.float64)
    if column.shape != (num_rows,) or not ((column >= 0) & (column <= 1)).all():
        raise DataError(f"{what} of shape {column.shape}: one probability in [0, 1] for each of {num_rows} candidates is needed")
    return column
