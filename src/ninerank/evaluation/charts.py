"""Charts as inline SVG: they take their colours from the page's CSS variables, so they follow light and dark.

Every chart has a `role`, a label for screen readers and a tooltip on each mark. Shape legend: K points or buckets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ninerank.metrics import Buckets, RocCurve
from ninerank.metrics.rows import Array

__all__ = ["calibration_chart", "forest_chart", "histogram_chart", "percent", "roc_chart"]

WIDTH, HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 14, 46
Z_95 = 1.96


@dataclass(frozen=True)
class Axis:
    """Values 0..high laid along low_px..high_px, linearly or by their square roots, which spreads what crowds near 0."""

    high: float
    low_px: float
    high_px: float
    root: bool = False

    def __call__(self, value: float) -> float:
        share = max(0.0, value / self.high)
        return self.low_px + (math.sqrt(share) if self.root else share) * (self.high_px - self.low_px)

    def ticks(self) -> list[float]:
        """0 and round numbers up to the end, at least a twelfth of the axis apart."""
        steps = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
        if not self.root:
            step = next(step for step in steps if self.high / step <= 6.0001)
            return [k * step for k in range(int(self.high / step + 1e-9) + 1)]
        chosen = [0.0]
        span = abs(self.high_px - self.low_px)
        for value in sorted(step for step in steps if step <= self.high * 1.0001):
            if abs(self(value) - self(chosen[-1])) >= span / 8:
                chosen.append(value)
        return chosen


def percent(value: float, digits: int = 1) -> str:
    """`value` in percent, with more digits below 1%.

    >>> percent(0.25), percent(0.0025), percent(0)
    ('25%', '0.25%', '0%')
    """
    text = f"{value * 100:.{digits if abs(value) >= 0.01 else digits + 2}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def roc_chart(curve: RocCurve, auc: float) -> str:
    """ROC curve over the diagonal of random scores."""
    if not math.isfinite(auc):
        return _nothing("ROC curve", "needs rows of both classes")
    across, up = _axes(1, 1)
    points = [(across(x), up(y)) for x, y in zip(curve.false_positive_rate_K, curve.true_positive_rate_K, strict=True)]
    area = f'<path class="area" d="{_path([*points, (across(1), up(0)), (across(0), up(0))])}Z"/>'
    diagonal = f'<path class="reference" d="{_path([(across(0), up(0)), (across(1), up(1))])}"/>'
    line = f'<path class="line" d="{_path(points)}"/>'
    note = f'<text class="value" x="{across(0.97):.1f}" y="{up(0.06):.1f}" text-anchor="end">AUC {auc:.4f}</text>'
    frame = _frame(across, up, "negatives ranked above the threshold", "positives found")
    return _svg(f"ROC curve, area {auc:.4f}", frame + area + diagonal + line + note)


def calibration_chart(buckets: Buckets, *, root: bool) -> str:
    """Share of positives against mean score by bucket, with 95% Wilson intervals, over the diagonal."""
    if not len(buckets.weight_K):
        return _nothing("Calibration", "needs rows")
    low_K, high_K = _wilson(buckets.positive_K, buckets.weight_K)
    high = min(1.0, 1.05 * float(max(buckets.score_K.max(), buckets.rate_K.max())) or 1.0)
    across, up = _axes(high, high, root=root)
    diagonal = f'<path class="reference" d="{_path([(across(0), up(0)), (across(high), up(high))])}"/>'
    marks = []
    for score, rate, low, top, weight in zip(buckets.score_K, buckets.rate_K, low_K, high_K, buckets.weight_K, strict=True):
        x, tip = across(score), f"mean score {percent(score, 2)}, observed {percent(rate, 2)}, {weight:,.0f} rows"
        whisker = f'<path class="whisker" d="{_path([(x, up(low)), (x, up(min(top, high)))])}"/>'
        marks.append(f'<g><title>{escape(tip)}</title>{whisker}<circle class="dot" cx="{x:.1f}" cy="{up(rate):.1f}" r="4"/></g>')
    line = f'<path class="line thin" d="{_path([(across(x), up(y)) for x, y in zip(buckets.score_K, buckets.rate_K, strict=True)])}"/>'
    scale = " (square-root scale)" if root else ""
    frame = _frame(across, up, f"mean score{scale}", f"observed rate{scale}")
    return _svg("Observed rate against mean score", frame + diagonal + line + "".join(marks))


def forest_chart(rows: Sequence[tuple[str, float, float, float]], label: str, *, more_is_better: bool) -> str:
    """Estimates with their intervals, one a line, over the line of no difference. rows: name, value, low, high."""
    known = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not known:
        return _nothing("Differences", "need rows of both classes")
    height, left = 30 * len(known) + 50, 170
    reach = 1.05 * max(max(abs(low), abs(high)) for _, _, low, high in known) or 1.0
    scale = (WIDTH - RIGHT - left) / (2 * reach)
    zero = left + reach * scale
    parts = [f'<path class="reference" d="{_path([(zero, 8), (zero, height - 36)])}"/>']
    for place, (name, value, low, high) in enumerate(known):
        y = 22 + 30 * place
        better = (low > 0) if more_is_better else (high < 0)
        worse = (high < 0) if more_is_better else (low > 0)
        style = "better" if better else "worse" if worse else "same"
        shown = name if len(name) <= 22 else name[:19] + "..."
        tip = f"{name}: {value:+.5f}, {low:+.5f} to {high:+.5f}"
        whisker = f'<path class="whisker" d="{_path([(zero + low * scale, y), (zero + high * scale, y)])}"/>'
        dot = f'<circle class="dot" cx="{zero + value * scale:.1f}" cy="{y}" r="4"/>'
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        parts.append(f'<g class="{style}"><title>{escape(tip)}</title>{whisker}{dot}</g>')
    for value in (-reach / 1.05, 0.0, reach / 1.05):
        parts.append(f'<text x="{zero + value * scale:.1f}" y="{height - 20}" text-anchor="middle">{value:+.2g}</text>')
    parts.append(f'<text class="title" x="{zero:.1f}" y="{height - 4}" text-anchor="middle">{escape(label)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def histogram_chart(histogram: Callable[[Array], Buckets], high: float, *, root: bool, num_bins: int = 40) -> str:
    """Scores of the positives and of the negatives, each as shares of its own class; the last bar holds whatever lies above.

    histogram: buckets between given edges.
    """
    edges = np.linspace(0, 1, num_bins + 1) ** (2 if root else 1) * high
    edges[-1] = 1.0
    found = histogram(edges)
    if not len(found.weight_K):
        return _nothing("Scores", "needs rows")
    across, _ = _axes(high, 1, root=root)
    shares = []
    for mass in (found.weight_K - found.positive_K, found.positive_K):
        shares.append(mass / (mass.sum() or 1.0))
    _, up = _axes(high, 1.08 * float(max(share.max() for share in shares)))
    drawn = ""
    for share, style, who in zip(shares, ("negative", "positive"), ("negatives", "positives"), strict=True):
        bars = []
        for low, top, part in zip(found.low_K, found.high_K, share, strict=True):
            x, width = across(low), across(min(top, high)) - across(low)
            tip = f"{percent(part)} of the {who}: {percent(low, 2)} to {percent(top, 2)}"
            size = f'x="{x:.1f}" y="{up(part):.1f}" width="{max(width - 0.6, 0.5):.1f}" height="{up(0) - up(part):.1f}"'
            bars.append(f"<rect {size}><title>{escape(tip)}</title></rect>")
        drawn += f'<g class="{style}">{"".join(bars)}</g>'
    frame = _frame(across, up, f"score{' (square-root scale)' if root else ''}", "share of the class")
    return _svg("Distribution of scores by class", frame + drawn + _legend(across(high), ("negative", "positive")))


def _wilson(positive_K: Array, weight_K: Array) -> tuple[Array, Array]:
    """95% interval of a rate (Wilson 1927)."""
    rate_K, z2 = positive_K / weight_K, Z_95**2
    centre = (rate_K + z2 / (2 * weight_K)) / (1 + z2 / weight_K)
    half = Z_95 * np.sqrt(rate_K * (1 - rate_K) / weight_K + z2 / (4 * weight_K**2)) / (1 + z2 / weight_K)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


def _axes(high_x: float, high_y: float, *, root: bool = False) -> tuple[Axis, Axis]:
    return Axis(high_x, LEFT, WIDTH - RIGHT, root), Axis(high_y, HEIGHT - BOTTOM, TOP, root)


def _frame(across: Axis, up: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<path class="grid" d="{_path([(LEFT, y), (WIDTH - RIGHT, y)])}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent(value)}</text>')
    for value in across.ticks():
        x = across(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{percent(value)}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="title" x="{middle_x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="rotate(-90 13 {middle_y:.1f})"'
    parts.append(f'<text class="title" x="13" y="{middle_y:.1f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _legend(right: float, styles: Sequence[str]) -> str:
    rows = []
    for k, style in enumerate(styles):
        y = TOP + 12 + 20 * k
        rows.append(f'<g class="{style}"><rect x="{right - 96:.1f}" y="{y - 10}" width="12" height="12" rx="2"/></g>')
        rows.append(f'<text x="{right - 78:.1f}" y="{y}">{style}s</text>')
    return "".join(rows)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(label: str, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{content}</svg>'


def _nothing(what: str, needs: str) -> str:
    return _svg(what, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">{escape(what)} {escape(needs)}</text>')
