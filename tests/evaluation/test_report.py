"""The pages: well-formed, self-contained, and safe whatever the data are called."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ninerank.evaluation.charts import Axis, calibration_chart, histogram_chart, percent, roc_chart
from ninerank.evaluation.evaluate import Evaluation, TaskEvaluation
from ninerank.evaluation.parity import Parity
from ninerank.evaluation.quality import Quality
from ninerank.evaluation.replay import Replay
from ninerank.evaluation.report import evaluation_page, replay_page, verdict
from ninerank.evaluation.scorer import ModelInfo
from ninerank.metrics import AUC, ScoreHistogram

HOSTILE = "<script>alert('x')</script>&\""
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Collects tags, text and attributes, and fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [str(value) for name, value in attrs if name in {"src", "href", "action", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def quality(rows: int = 3000, rate: float = 0.05) -> Quality:
    rng = np.random.default_rng(4)
    score = rng.beta(1, 1 / rate - 1, rows).astype(np.float32)
    return Quality().update((rng.random(rows) < score).astype(int), score, None, rng.integers(0, 50, rows))


def evaluation(found: Quality, name: str = "click") -> Evaluation:
    summary = found.summary()
    task = TaskEvaluation(name, found, summary, {name: {name: summary, "other": summary}})
    return Evaluation(ModelInfo(name, "run", name, "1", "ab" * 32, "cpu"), (name,), summary.rows, 2.0, (task,))


def replayed(found: Quality | None, difference: float, name: str = "click") -> Replay:
    scores = np.full((3, 1), 0.5, np.float32)
    parity = Parity().update(name, scores, scores + np.float32(difference))
    by_task = {} if found is None else {name: found}
    model = {(name, "1"): 1}
    return Replay(name, name, "bundle", "ab" * 32, "cpu", 1.0, 1e-6, parity, model, model, by_task, by_task, None)


@pytest.mark.parametrize("name", ["click", HOSTILE])
@pytest.mark.parametrize(
    "make", [lambda name: evaluation_page(evaluation(quality(), name)), lambda name: replay_page(replayed(quality(), 0.1, name))]
)
def test_pages_nest_load_nothing_and_escape_names(make: object, name: str) -> None:
    page = make(name)  # type: ignore[operator]
    outline = Outline(page)
    assert outline.references == []
    assert "script" not in outline.tags
    assert "link" not in outline.tags
    assert not re.search(r"url\(|@import|https?://", page)
    assert name in outline.text
    assert "nan" not in page.lower().replace("nano", "")


def test_evaluation_page_says_what_was_found() -> None:
    found = evaluation(quality())
    outline = Outline(evaluation_page(found))
    summary = found.tasks[0].summary
    for expected in (f"{summary.auc:.4f}", f"{summary.gauc:.4f}", f"{summary.logloss:.4f}", "ab" * 32, "By click", "3,000"):
        assert expected in outline.text
    assert outline.tags.count("svg") == 3


@pytest.mark.parametrize("rows", [1, 2, 30])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_and_few_rows_still_make_a_page(rows: int, label: int) -> None:
    found = Quality().update([label] * rows, np.linspace(0.2, 1, rows))
    outline = Outline(evaluation_page(evaluation(found)))
    assert "there is no ranking to judge" in outline.text
    assert "needs rows of both classes" in outline.text


@pytest.mark.parametrize("score", [0.0, 1.0, 0.5])
def test_equal_scores_make_a_page(score: float) -> None:
    assert "50%" in Outline(evaluation_page(evaluation(Quality().update([0, 1, 0], [score] * 3)))).text


def test_replay_page_passes_or_fails() -> None:
    assert "PASS" in Outline(replay_page(replayed(None, 0.0))).text
    failed = Outline(replay_page(replayed(None, 0.25))).text
    assert "FAIL" in failed
    assert "0.5 as served, 0.75 now" in failed
    assert "FAIL" in Outline(replay_page(replayed(None, math.nan))).text


@pytest.mark.parametrize(
    ("predicted", "words"), [(1.0, "match the observed rate of 50%"), (0.5, "50% too few: 25% against"), (1.5, "50% too many: 75% against")]
)
def test_verdict_in_words(predicted: float, words: str) -> None:
    summary = Quality().update([0, 1, 0, 1], np.array([0.49, 0.51, 0.49, 0.51]) * predicted).summary()
    assert words in verdict(summary, "click")
    assert "ranks them right 100% of the time" in verdict(summary, "click")


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("high", [1.0, 0.3, 0.034, 1e-4])
def test_axes_have_round_ticks_within_their_ends(root: bool, high: float) -> None:
    axis = Axis(high, 50, 450, root)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 9
    assert ticks[0] == 0
    assert ticks == sorted(ticks)
    assert all(50 <= axis(tick) <= 450.5 for tick in ticks)
    assert all(re.fullmatch(r"\d+(\.\d{1,4})?%", percent(tick)) for tick in ticks)


def test_marks_stay_inside_the_chart() -> None:
    found = quality()
    for svg in (
        roc_chart(found.curve(), found.summary().auc),
        calibration_chart(found.buckets(), root=True),
        calibration_chart(found.buckets(), root=False),
        histogram_chart(found.histogram.between, 0.1, root=True),
    ):
        for x, y in re.findall(r"[ML]([\d.-]+),([\d.-]+)", svg):
            assert 0 <= float(x) <= 460
            assert 0 <= float(y) <= 340
        for x, y, width, height in re.findall(r'x="([\d.-]+)" y="([\d.-]+)" width="([\d.-]+)" height="([\d.-]+)"', svg):
            assert 0 <= float(x) <= float(x) + float(width) <= 461
            assert 0 <= float(y) <= float(y) + float(height) <= 341


def test_histogram_counts_what_lies_above_its_end_in_the_last_bar() -> None:
    histogram = ScoreHistogram().update([0, 0, 1], [0.04, 0.9, 0.9])
    svg = histogram_chart(histogram.between, 0.1, root=False, num_bins=2)
    assert "50% of the negatives: 5% to 100%" in svg
    assert "100% of the positives: 5% to 100%" in svg


def test_nothing_to_draw_says_so() -> None:
    assert "needs rows" in calibration_chart(Quality().buckets(), root=False)
    assert "needs rows" in histogram_chart(ScoreHistogram().between, 1, root=False)
    assert "needs rows of both classes" in roc_chart(AUC().curve(), math.nan)


@pytest.mark.browser
def test_a_browser_shows_the_page_whole(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(evaluation_page(evaluation(quality(), HOSTILE)), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    charts = browser.find_elements("css selector", "svg[role=img]")
    assert len(charts) == 3
    assert all(chart.is_displayed() and chart.size["width"] > 200 for chart in charts)
    width = browser.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width == 0, "the page is wider than its window"
    browser.set_window_size(420, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= browser.execute_script("return innerWidth")
