"""The page of a comparison, for a reader who must decide and does not know the metrics."""

from collections.abc import Iterable
from html import escape

from ninerank.evaluation.charts import forest_chart
from ninerank.evaluation.compare.differences import Difference
from ninerank.evaluation.compare.rules import METRICS
from ninerank.evaluation.compare.samples import Sample
from ninerank.evaluation.compare.verdict import Comparison
from ninerank.evaluation.page import chart_card, glossary, number, page, table_section, tiles
from ninerank.evaluation.report import quality_section

__all__ = ["comparison_page"]

TITLES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss", "ne": "NE", "ndcg": "NDCG"}
BADGES = {"b_better": ("good", "B IS BETTER"), "a_better": ("bad", "A IS BETTER"), "no_difference": ("bad", "NO DIFFERENCE SHOWN")}


def comparison_page(found: Comparison) -> str:
    """The whole page."""
    a, b = found.names
    style, badge = BADGES[found.outcome]
    advice = "Launch B." if found.launch else "Do not launch B on this evidence."
    badge_html = f'<span class="badge {style}">{badge}</span>'
    sections = [
        f'<p class="verdict">{badge_html} {escape(found.sentence())} <strong>{advice}</strong></p>',
        _who(found),
        _tiles(found),
        _guardrails(found),
        _metrics(found),
        *_slices(found),
        *_curves(found),
        _changes(found),
        *_samples(found.samples),
        glossary(),
    ]
    return page(f"{a} against {b}", "Comparison", sections)


def _who(found: Comparison) -> str:
    sizes = f"{found.compared.num_requests:,} requests, {len(found.compared.label_M):,} labelled candidates"
    how = "Differences are B less A, paired by candidate and clustered by request; intervals hold however often one looks."
    return f'<p class="hint">A: {escape(found.names[0])}. B: {escape(found.names[1])}. {sizes}. {how}</p>'


def _tiles(found: Comparison) -> str:
    return tiles(
        {
            TITLES[name]: (f"{own.fixed.value:+.5f}", f"{number(own.a)} → {number(own.b)}, {'more' if METRICS[name] else 'less'} is better")
            for name, own in found.metrics.items()
        }
    )


def _guardrails(found: Comparison) -> str:
    rows = [
        [
            escape(own.name),
            number(own.found),
            escape(own.allowed),
            f'<span class="{_style(own.passed)}">{"PASS" if own.passed else "FAIL"}</span>',
        ]
        for own in found.guardrails
    ]
    return table_section("Guardrails", ["bound", "found", "allowed", "verdict"], rows) if rows else ""


def _metrics(found: Comparison) -> str:
    rows = [_row(f"{TITLES[name]}{' (decides)' if name == found.rules.primary else ''}", own, found) for name, own in found.metrics.items()]
    return table_section("Differences", _heads(found), rows)


def _heads(found: Comparison) -> list[str]:
    return ["", "rows", "A", "B", "B less A", f"{found.rules.level:.0%} interval, always valid", "at this look alone", "p, corrected"]


def _row(name: str, own: Difference, found: Comparison) -> list[str]:
    sure = own.adjusted < 1 - found.rules.level
    shown = f"{own.fixed.value:+.5f}"
    return [
        escape(name),
        f"{own.num_rows:,}",
        number(own.a, 5),
        number(own.b, 5),
        f'<span class="{_style(own.gain > 0)}">{shown}</span>' if sure else shown,
        f"{own.always.low:+.5f} to {own.always.high:+.5f}",
        f"{own.fixed.low:+.5f} to {own.fixed.high:+.5f}",
        f"{own.adjusted:.3g}",
    ]


def _slices(found: Comparison) -> Iterable[str]:
    title = TITLES[found.rules.primary]
    for column, own in found.slices.items():
        chart = forest_chart(
            [(name, one.fixed.value, one.always.low, one.always.high) for name, one in own.items()],
            f"{title}, B less A",
            more_is_better=METRICS[found.rules.primary],
        )
        yield f"<h2>{escape(title)} by {escape(column)}</h2>"
        hint = "Dots: difference; bars: always valid interval. The dashed line is no difference."
        yield f'<div class="one">{chart_card(f"By {column}", hint, chart)}</div>'
        yield table_section("", _heads(found), [_row(name, one, found) for name, one in own.items()])


def _curves(found: Comparison) -> Iterable[str]:
    for side, name, quality in zip("AB", found.names, found.qualities, strict=True):
        yield f"<h2>{side}: {escape(name)}</h2>"
        yield quality_section(quality, quality.summary())


def _changes(found: Comparison) -> str:
    rows = [
        [escape(name), _wrapped(a), _wrapped(b) if a == b else f"<strong>{_wrapped(b)}</strong>"] for name, (a, b) in found.facts.items()
    ]
    return table_section("What changed", ["", "A", "B"], rows)


def _wrapped(text: str) -> str:
    return f'<span class="why">{escape(text)}</span>'


def _samples(samples: Iterable[Sample]) -> Iterable[str]:
    for sample in samples:
        rows = []
        for own in sample.candidates:
            label = "–" if own.label != own.label else f"{own.label:.0f}"
            scores = [f"{own.a:.5f} (place {own.a_place})", f"{own.b:.5f} (place {own.b_place})"]
            rows.append([escape(own.name), label, *scores, _why(own.a_why), _why(own.b_why)])
        user = ", ".join(f"{name} {value}" for name, value in sample.user.items())
        heads = ["candidate", "label", "A", "B", "what moved A's score", "what moved B's score"]
        yield table_section(f"Request {sample.request_id}, {sample.num_candidates} candidates", heads, rows)
        yield f'<p class="hint">{escape(user)}</p>'


def _why(features: Iterable[tuple[str, float]]) -> str:
    shown = ", ".join(f"{name} {value:+.4f}" for name, value in features)
    return _wrapped(shown or "–")


def _style(good: bool) -> str:
    return "good" if good else "bad"
