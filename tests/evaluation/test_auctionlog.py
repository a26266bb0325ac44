"""Auction logs: mapped columns, calibrated scores, and the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ninerank.cli.main import main
from ninerank.errors import DataError
from ninerank.evaluation.auction import AuctionRule, Candidates, hold
from ninerank.evaluation.auctionlog import AuctionColumns, read_auctions, replay_auctions

COLUMNS = AuctionColumns(auction="rid", other="new", place="at", click="clicked", price="paid")


def written(path: Path, auctions: int = 3000) -> tuple[Path, np.ndarray]:
    """A log whose baseline scores are twice too high and noisy; the new ones are 3 times too low and exact."""
    rng = np.random.default_rng(4)
    rows = auctions * 4
    truth, bid = rng.beta(2, 20, rows), rng.gamma(2.0, 0.5, rows)
    old, new = np.clip(2 * truth * np.exp(rng.normal(-0.18, 0.6, rows)), 0, 1), truth / 3
    auction, advertiser = np.repeat(np.arange(auctions), 4), rng.integers(0, 5, rows)
    served = hold(Candidates.of(auction, advertiser, bid), old, AuctionRule())
    table = {
        "rid": [f"r{n}" for n in auction],
        "advertiser": [f"shop {n}" for n in advertiser],
        "bid": bid,
        "score": old,
        "new": new,
        "at": served.place_N,
        "clicked": ((rng.random(rows) < truth) & (served.place_N == 0)).astype(int),
        "paid": served.price_N,
    }
    pq.write_table(pa.table(table), path)
    return path, truth


def test_calibrated_sides_are_comparable_and_agree_with_the_log(tmp_path: Path) -> None:
    path, truth = written(tmp_path / "log.parquet")
    log = read_auctions(path, COLUMNS)
    assert sorted(log.advertisers) == [f"shop {n}" for n in range(5)]
    raw, found = replay_auctions(log, AuctionRule()).value(), replay_auctions(log, AuctionRule(), calibrate=True).value()
    assert raw.logged_clicks is not None
    assert found.logged_clicks is not None
    assert raw.logged_winner_share == 1.0
    assert not raw.logged_clicks.covers(raw.clicks.value)
    assert found.clicks.value == pytest.approx(found.logged_clicks.value, rel=0.15)
    assert found.auctions == 3000
    assert len(found.advertisers) == 5
    # By the true chances, which a log does not hold, the exact model wins more clicks for what is bid.
    by_truth = hold(log.candidates, truth, AuctionRule(pricing="first")).revenue_N.sum()
    assert by_truth > hold(log.candidates, log.score_N, AuctionRule(pricing="first"), truth).revenue_N.sum()


def test_wrong_logs_are_refused(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "log.parquet", 10)
    with pytest.raises(DataError, match="column 'request_id' is missing"):
        read_auctions(path, AuctionColumns())
    plain = read_auctions(path, COLUMNS.model_copy(update={"click": None}))
    with pytest.raises(DataError, match="name the columns `place` and `click`"):
        replay_auctions(plain, AuctionRule(), calibrate=True)
    none = replace(read_auctions(path, COLUMNS), click_N=np.zeros(40))
    with pytest.raises(DataError, match="there are none"):
        replay_auctions(none, AuctionRule(), calibrate=True)


def test_the_command_prints_tables_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = written(tmp_path / "log.parquet", 500)
    (tmp_path / "columns.yaml").write_text("auction: rid\nother: new\nplace: at\nclick: clicked\nprice: paid\n")
    (tmp_path / "other.yaml").write_text("pricing: first\nreserve_ecpm: 20\n")
    words = ["-q", "auction", str(path), "--columns", str(tmp_path / "columns.yaml"), "--other-rule", str(tmp_path / "other.yaml")]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--calibrate", "--top", "2", "--out", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert not stop.value.code
    assert "500 auctions; winners change in" in printed
    assert "of its winners are the baseline's" in printed
    assert printed.count("shop ") == 2
    with pytest.raises(SystemExit):
        main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["auctions"] == 500
    assert sorted(found["advertisers"]) == [f"shop {n}" for n in range(5)]
    assert found["advertisers"]["shop 1"]["other"]["win_rate"] <= 1
    assert set(json.loads((tmp_path / "out.json").read_text())) == set(found)
    (tmp_path / "other.yaml").write_text("pricing: third\n")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
