"""Auctions held again: prices by hand, expected clicks against simulated ones, by advertiser, over any split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.errors import DataError, SpecError
from ninerank.evaluation.auction import AuctionReplay, AuctionRule, Candidates, hold
from ninerank.metrics import Recalibration, calibration, pcoc

# Auction 1: eCPM 100, 120, 30. Auction 2: eCPM 40 alone. Advertiser 9 bids twice in auction 1.
ADS = Candidates.of([1, 1, 1, 2], [7, 8, 9, 9], [1.0, 2.0, 1.5, 0.5])
SCORES = np.array([0.1, 0.06, 0.02, 0.08])


def test_prices_by_hand() -> None:
    first = hold(ADS, SCORES, AuctionRule(pricing="first"))
    assert first.place_N.tolist() == [-1, 0, -1, 0]
    assert first.price_N.tolist() == [0, 2.0, 0, 0.5]
    second = hold(ADS, SCORES, AuctionRule(places=(1.0, 0.5)))
    assert second.place_N.tolist() == [1, 0, -1, 0]
    # 100 / (1000 * .06), then 30 / (1000 * .1); nobody below and no reserve costs nothing.
    assert second.price_N.tolist() == pytest.approx([0.3, 100 / 60, 0, 0])
    assert second.click_N.tolist() == pytest.approx([0.05, 0.06, 0, 0.08])
    assert second.revenue_N.tolist() == pytest.approx([0.015, 0.1, 0, 0])
    reserved = hold(ADS, SCORES, AuctionRule(reserve_ecpm=50, places=(1.0, 0.5)))
    assert reserved.place_N.tolist() == [1, 0, -1, -1]
    assert reserved.price_N.tolist() == pytest.approx([0.5, 100 / 60, 0, 0])
    assert hold(ADS, SCORES, AuctionRule(), np.full(4, 0.5)).click_N.tolist() == [0, 0.5, 0, 0.5]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20),
    pricing=st.sampled_from(["first", "second"]),
    reserve=st.sampled_from([0.0, 300.0]),
)
def test_no_winner_pays_more_than_the_bid_or_less_than_the_reserve(
    rows: list[tuple[int, int, int, int]], pricing: str, reserve: float
) -> None:
    auction, advertiser, bid, score = (np.array(column) for column in zip(*rows, strict=True))
    ads, rule = Candidates.of(auction, advertiser, bid), AuctionRule(pricing=pricing, reserve_ecpm=reserve, places=(1.0, 0.4))
    found = hold(ads, score / 5, rule)
    ecpm, won = 1000 * bid * score / 5, found.place_N >= 0
    assert (found.price_N <= bid + 1e-12).all()
    assert (1000 * found.price_N * score / 5 >= reserve - 1e-9)[won].all()
    assert (found.revenue_N[~won] == 0).all()
    for key in np.unique(auction):
        own = auction == key
        winners = np.flatnonzero(own & won)
        assert sorted(found.place_N[winners].tolist()) == list(range(len(winners)))
        assert len(winners) == min(2, int(((ecpm >= reserve) & (ecpm > 0))[own].sum()))
        if len(winners) < own.sum() and len(winners):
            assert ecpm[winners].min() >= ecpm[own & ~won].max() or len(winners) < 2


class Market:
    """Auctions with true click chances, a calibrated model, and a poor one that ranks by noise."""

    def __init__(self, seed: int, auctions: int) -> None:
        rng = np.random.default_rng(seed)
        rows = auctions * 5
        self.ads = Candidates.of(np.repeat(np.arange(auctions), 5), rng.integers(0, 8, rows), rng.gamma(2.0, 0.5, rows))
        self.truth = rng.beta(1, 12, rows)
        self.poor = np.clip(self.truth * np.exp(rng.normal(0, 1.2, rows)), 0, 1)
        self.clicked = rng.random(rows) < self.truth


RULE = AuctionRule(pricing="first")


def test_a_better_model_earns_more_and_the_log_agrees() -> None:
    market = Market(1, 4000)
    served = hold(market.ads, market.poor, RULE)
    found = (
        AuctionReplay(RULE)
        .update(
            market.ads,
            market.poor,
            market.truth,
            chance_N=market.truth,
            logged_place_N=served.place_N,
            logged_click_N=market.clicked,
            logged_price_N=served.price_N,
        )
        .value()
    )
    assert found.auctions == 4000
    assert found.revenue_difference.low > 0
    assert found.revenue_difference.value == pytest.approx(found.other_revenue.value - found.revenue.value)
    assert 0.2 < found.changed_share.value < 0.8
    assert found.logged_winner_share == 1.0
    assert found.logged_clicks is not None
    assert found.logged_revenue is not None
    assert found.logged_clicks.covers(found.clicks.value)
    assert found.logged_revenue.covers(found.revenue.value)
    assert sum(own.revenue for _, own in found.advertisers.values()) == pytest.approx(4000 * found.other_revenue.value)
    assert sum(own.wins for own, _ in found.advertisers.values()) == 4000
    for own, other in found.advertisers.values():
        assert own.auctions == other.auctions
        assert 0 <= own.win_rate <= 1


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 40), seed=st.integers(0, 50))
def test_merge_over_any_split_of_auctions_is_the_whole(cut: int, seed: int) -> None:
    market, other = Market(seed, 40), AuctionRule(reserve_ecpm=40)

    def replayed(low: int, high: int) -> AuctionReplay:
        own = slice(low * 5, high * 5)
        ads = Candidates.of(market.ads.auction_N[own], market.ads.advertiser_N[own], market.ads.bid_N[own])
        places = np.where(market.clicked[own], 0, -1)
        return AuctionReplay(RULE, other).update(
            ads, market.poor[own], market.truth[own], logged_place_N=places, logged_click_N=market.clicked[own]
        )

    whole = replayed(0, 40).value()
    merged = AuctionReplay.from_state(replayed(cut, 40).state()).merge(AuctionReplay.from_state(replayed(0, cut).state())).value()
    for name, mine, theirs in zip(whole._fields, merged, whole, strict=True):
        if name == "advertisers":
            assert {key: pair[1].revenue for key, pair in mine.items()} == pytest.approx(
                {key: pair[1].revenue for key, pair in theirs.items()}
            )
            assert {key: pair[0].wins for key, pair in mine.items()} == {key: pair[0].wins for key, pair in theirs.items()}
        else:
            assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9, nan_ok=True)


def test_recalibrated_scores_are_true_and_keep_their_order() -> None:
    rng = np.random.default_rng(3)
    score = rng.beta(1, 9, 100_000)
    truth = 0.6 * score**1.3
    label = rng.random(len(score)) < truth
    fix = Recalibration.of(calibration(label[:50_000], score[:50_000], num_buckets=50))
    fixed = fix(score[50_000:])
    assert abs(pcoc(label[50_000:], fixed) - 1) < 0.05
    assert abs(pcoc(label[50_000:], score[50_000:]) - 1) > 0.5
    assert np.abs(fixed - truth[50_000:]).mean() < 0.004
    assert (np.diff(fix(np.linspace(0, 1, 500))) >= 0).all()
    assert (np.diff(fix.rate_K) > 0).all()
    again = Recalibration.from_state(fix.state())
    np.testing.assert_array_equal(again(score), fix(score))
    with pytest.raises(DataError, match="no rows to recalibrate by"):
        Recalibration.of(calibration([], []))


def test_wrong_auctions_are_refused() -> None:
    with pytest.raises(DataError, match="bids of shape"):
        Candidates.of([1], [1], [-1.0])
    with pytest.raises(DataError, match="auctions are float64"):
        Candidates.of([0.5], [1], [1.0])
    with pytest.raises(DataError, match=r"scores of shape \(3,\): one probability in \[0, 1\] for each of 4"):
        hold(ADS, SCORES[:3], RULE)
    with pytest.raises(DataError, match="chances of shape"):
        hold(ADS, SCORES, RULE, SCORES * 100)
    with pytest.raises(SpecError, match="pricing"):
        AuctionRule.parse({"pricing": "third"}, "rule")
    with pytest.raises(DataError, match="logged places have shape"):
        AuctionReplay(RULE).update(ADS, SCORES, SCORES, logged_place_N=[0])
    with pytest.raises(ValueError, match="other rules do not merge"):
        AuctionReplay(RULE).merge(AuctionReplay(AuctionRule()))
