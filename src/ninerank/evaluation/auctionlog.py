"""Auction logs with columns mapped by a YAML file, their scores made true by the clicks that were logged.

Shape legend: N candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field

from ninerank.config import Config
from ninerank.errors import DataError
from ninerank.evaluation.auction import AuctionReplay, AuctionRule, Candidates
from ninerank.evaluation.logcolumns import read_columns
from ninerank.metrics import Recalibration, calibration
from ninerank.metrics.rows import Array

__all__ = ["AuctionColumns", "AuctionLog", "read_auctions", "replay_auctions"]


class AuctionColumns(Config):
    """Which column holds what, one row a candidate of an auction."""

    auction: str = Field(default="request_id", description="request whose candidates bid against each other")
    advertiser: str = "advertiser"
    bid: str = Field(default="bid", description="what the advertiser offers for a click")
    score: str = Field(default="score", description="pCTR by which the baseline ranks")
    other: str | None = Field(default=None, description="pCTR by which the other side ranks; the baseline's if not named")
    chance: str | None = Field(default=None, description="best estimate of the click chance; the mean of both sides' scores if not named")
    place: str | None = Field(default=None, description="place where the candidate was shown, from 0; -1 where it was not")
    click: str | None = Field(default=None, description="0 or 1")
    price: str | None = Field(default=None, description="what a click cost")


@dataclass(frozen=True)
class AuctionLog:
    """Candidates with the scores of both sides, float64 (N,), and what was logged of them, None where it was not."""

    candidates: Candidates
    advertisers: list[str]
    score_N: Array
    other_N: Array
    chance_N: Array | None
    place_N: Array | None
    click_N: Array | None
    price_N: Array | None


def read_auctions(paths: str | Path | Sequence[str | Path], columns: AuctionColumns) -> AuctionLog:
    """Read files or folders of Parquet, Arrow, CSV or TSV; about 80 bytes a candidate are held. Raises DataError as `read_columns`."""
    texts = {"auction": columns.auction, "advertiser": columns.advertiser}
    numbers = {name: column for name, column in columns.model_dump().items() if column and name not in texts}
    found = read_columns(paths, numbers, texts)
    number = {name: found[name].to_numpy() for name in numbers}
    auction, advertiser = (found[name].dictionary_encode() for name in texts)
    candidates = Candidates.of(_codes(auction), _codes(advertiser), number["bid"])
    names: list[str] = advertiser.dictionary.to_pylist()
    place = number["place"].astype(np.int64) if "place" in number else None
    other = number.get("other", number["score"])
    return AuctionLog(candidates, names, number["score"], other, number.get("chance"), place, number.get("click"), number.get("price"))


def replay_auctions(log: AuctionLog, rule: AuctionRule, other: AuctionRule | None = None, *, calibrate: bool = False) -> AuctionReplay:
    """Hold the auctions of a log by both sides' scores and rules.

    calibrate: make both sides' scores true first, by the clicks at the first place (others are looked at less). Clicks are expected by
    `chance_N`, or the mean of both sides' scores, which favours neither. Raises DataError where a log cannot be calibrated by.
    """
    score_N, other_N = log.score_N, log.other_N
    if calibrate:
        score_N, other_N = _calibrated(log, score_N), _calibrated(log, other_N)
    chance_N = (score_N + other_N) / 2 if log.chance_N is None else log.chance_N
    return AuctionReplay(rule, other).update(
        log.candidates,
        score_N,
        other_N,
        chance_N=chance_N,
        logged_place_N=log.place_N,
        logged_click_N=log.click_N,
        logged_price_N=log.price_N,
    )


def _calibrated(log: AuctionLog, score_N: Array) -> Array:
    if log.place_N is None or log.click_N is None:
        raise DataError("scores are calibrated by logged clicks: name the columns `place` and `click`")
    first = log.place_N == 0
    if not log.click_N[first].any():
        raise DataError("scores are calibrated by the clicks at place 0, and there are none")
    return Recalibration.of(calibration(log.click_N[first], score_N[first], num_buckets=50))(score_N)


def _codes(column: pa.Array) -> Array:
    code: Array = column.indices.to_numpy().astype(np.int64)
    return code
