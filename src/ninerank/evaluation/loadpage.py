"""The page of a load test: percentiles, and how they went second by second."""

import math
from collections.abc import Sequence
from html import escape

from ninerank.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from ninerank.evaluation.page import chart_card, facts_section, number, page, table_section, tiles
from ninerank.predictor.load import PERCENTILES, LoadResult

__all__ = ["load_page"]


def load_page(target: str, found: LoadResult) -> str:
    """HTML page of a load test."""
    config = found.config
    loop = f"open loop, {config.rate:g} requests/s" if config.rate is not None else f"closed loop, {config.concurrency} at once"
    failed = found.asked - found.served
    head = f"{found.requests_per_s:,.0f} requests a second were answered within {config.deadline_ms:g} ms"
    verdict = f'<p class="verdict">{head}; {failed:,} of {found.asked:,} were not.</p>'
    notes = "".join(f'<p class="hint">{escape(note)}</p>' for note in found.notes)
    seconds = found.by_second()
    charts = [
        chart_card(
            "Latency", "Milliseconds that a share of the answers does not exceed; the axis spreads the slow end.", _percentiles(found)
        ),
        chart_card(
            "Latency by second",
            "Median and 99th percentile.",
            _lines([[s["p50_ms"] for s in seconds], [s["p99_ms"] for s in seconds]], "ms"),
        ),
        chart_card("Answers by second", "Those that came in time.", _lines([[s["served"] for s in seconds]], "answers")),
    ]
    statuses = [[escape(name), f"{count:,}"] for name, count in sorted(found.statuses.items(), key=lambda pair: -pair[1])]
    shown = {f"p{percent:g}": (f"{number(found.percentile_ms(percent), 2)} ms", loop) for percent in PERCENTILES}
    facts = {
        "Target": target,
        "Load": loop,
        "Measured": f"{found.seconds:g} s after {config.warmup_s:g} s",
        "Client late by": f"{found.behind_s * 1e3:.2f} ms",
    }
    sections = [
        verdict,
        notes,
        tiles(shown),
        f'<div class="charts">{"".join(charts)}</div>',
        table_section("Answers", ["status", "calls"], statuses, narrow=True),
        facts_section(facts),
    ]
    return page(target, "Load test", sections)


def _percentiles(found: LoadResult) -> str:
    """Latency against 1 / (1 - share), logarithmic on both axes."""
    shares = [1 - 10 ** (-k / 10) for k in range(1, 41)]
    points = [(-math.log10(1 - share), found.percentile_ms(100 * share)) for share in shares if (1 - share) * found.served >= 1]
    if len(points) < 2:
        return _empty("Latency")
    low, high = math.log10(points[0][1]), math.log10(points[-1][1] * 1.1)
    span = max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / points[-1][0] * (WIDTH - RIGHT - LEFT)
        return across, HEIGHT - BOTTOM - (math.log10(y) - low) / span * (HEIGHT - BOTTOM - TOP)

    parts = []
    for percent in (50, 90, 99, 99.9, 99.99):
        x = -math.log10(1 - percent / 100)
        if x <= points[-1][0]:
            across, _ = place(x, points[0][1])
            parts.append(f'<path class="grid" d="M{across:.1f},{TOP}L{across:.1f},{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{percent:g}%</text>')
    for k in range(5):
        value = 10 ** (low + span * k / 4)
        _, up = place(0, value)
        parts.append(f'<text x="{LEFT - 8}" y="{up + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    return _svg("Latency by share of answers, in milliseconds", "".join(parts) + f'<path class="line" d="M{path}"/>')


def _lines(series: Sequence[Sequence[float]], unit: str) -> str:
    known = [value for values in series for value in values if math.isfinite(value)]
    if not known or len(series[0]) < 2:
        return _empty(f"By second, {unit}")
    high, last = max(known) * 1.1 or 1.0, len(series[0]) - 1
    parts = []
    for k in range(5):
        up = HEIGHT - BOTTOM - k / 4 * (HEIGHT - BOTTOM - TOP)
        parts.append(f'<path class="grid" d="M{LEFT},{up:.1f}L{WIDTH - RIGHT},{up:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up + 4:.1f}" text-anchor="end">{high * k / 4:.3g}</text>')
    for second in sorted({0, last // 2, last}):
        across = LEFT + second / last * (WIDTH - RIGHT - LEFT)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{second} s</text>')
    for style, values in zip(("line", "line thin"), series, strict=False):
        points = [
            (LEFT + n / last * (WIDTH - RIGHT - LEFT), HEIGHT - BOTTOM - value / high * (HEIGHT - BOTTOM - TOP))
            for n, value in enumerate(values)
            if math.isfinite(value)
        ]
        parts.append(f'<path class="{style}" d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    return _svg(f"By second, {unit}", "".join(parts))


def _svg(label: str, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _empty(label: str) -> str:
    return _svg(label, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">too few answers</text>')
