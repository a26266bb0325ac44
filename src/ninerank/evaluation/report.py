"""Reports of an evaluation and of a replay, each one self-contained HTML page, readable without knowing the metrics."""

import math
from collections.abc import Iterable, Mapping
from html import escape

from ninerank.evaluation.charts import calibration_chart, histogram_chart, percent, roc_chart
from ninerank.evaluation.evaluate import Evaluation, TaskEvaluation
from ninerank.evaluation.page import chart_card, facts_section, glossary, inline_bar, number, page, table_section, tiles
from ninerank.evaluation.quality import Quality, Summary
from ninerank.evaluation.replay import Replay

__all__ = ["evaluation_page", "replay_page"]

# Below this rate of positives scores crowd near 0 and are drawn on a square-root scale.
ROOT_SCALE_BELOW = 0.15


def evaluation_page(evaluation: Evaluation) -> str:
    """HTML page of an evaluation."""
    model = evaluation.model
    title = f"{model.name} {model.version}"
    sections = [section for task in evaluation.tasks for section in task_sections(task, single=len(evaluation.tasks) == 1)]
    facts = {
        "Model": f"{model.name} {model.version} ({model.kind})",
        "Source": model.source,
        "Spec digest": model.spec_digest,
        "Data": ", ".join(evaluation.data),
        "Rows": f"{evaluation.rows:,}",
        "Time": f"{evaluation.seconds:.1f} s on {model.device}, {evaluation.rows / evaluation.seconds:,.0f} rows/s",
    }
    return page(title, "Evaluation", [*sections, facts_section(facts), glossary()])


def task_sections(task: TaskEvaluation, *, single: bool) -> Iterable[str]:
    """Verdict, tiles, charts and slice tables of one task."""
    if not single:
        yield f"<h2>{escape(task.label)}</h2>"
    yield f'<p class="verdict">{verdict(task.summary, task.label)}</p>'
    yield quality_section(task.quality, task.summary)
    for column, found in task.slices.items():
        yield slice_table(column, found, task.summary)


def verdict(summary: Summary, label: str) -> str:
    """Two sentences for a reader who knows no metric."""
    what = escape(label)
    if not math.isfinite(summary.auc):
        return f"All {summary.rows:,} rows have the same {what} label, so there is no ranking to judge."
    ranking = f"Given one row with {what} and one without, the model ranks them right {percent(summary.auc)} of the time (guessing: 50%)."
    off = summary.pcoc - 1
    if abs(off) < 0.005:
        return f"{ranking} On average its predictions match the observed rate of {percent(summary.positive_rate, 2)}."
    return (
        f"{ranking} On average it predicts {percent(abs(off))} too {'many' if off > 0 else 'few'}: "
        f"{percent(summary.mean_score, 2)} against an observed rate of {percent(summary.positive_rate, 2)}."
    )


def quality_section(quality: Quality, summary: Summary) -> str:
    """Tiles and the three charts."""
    root = summary.positive_rate < ROOT_SCALE_BELOW
    high = _score_range(quality)
    numbers = {
        "AUC": (number(summary.auc), "ranking, 1 is perfect"),
        **({} if summary.gauc is None else {"GAUC": (number(summary.gauc), "ranking within groups")}),
        "Log loss": (number(summary.logloss), "lower is better"),
        "NE": (number(summary.ne), "below 1 beats the average"),
        "PCOC": (number(summary.pcoc, 3), "predicted / observed"),
        "ECE": (number(summary.ece), "calibration error"),
        "Positives": (percent(summary.positive_rate, 2), f"of {summary.rows:,} rows"),
    }
    calibrated = calibration_chart(quality.buckets(), root=root)
    scores = histogram_chart(quality.histogram.between, high, root=root)
    charts = [
        chart_card("Ranking", "The further the curve bends to the upper left, the better.", roc_chart(quality.curve(), summary.auc)),
        chart_card("Calibration", "Dots on the dashed line: predictions come true. Bars: 95% interval.", calibrated),
        chart_card("Scores", "The less the two classes overlap, the better.", scores),
    ]
    return f'{tiles(numbers)}<div class="charts">{"".join(charts)}</div>'


def slice_table(column: str, found: Mapping[str, Summary], whole: Summary) -> str:
    """Metrics by value of one column, with the whole on top."""
    widest = max((own.rows for own in found.values()), default=1)
    rows = [_row("all", whole), *(_row(value, own, own.rows / widest) for value, own in found.items())]
    return table_section(f"By {column}", [column, *_heads(whole)], rows, whole=True)


def _heads(whole: Summary) -> list[str]:
    return ["rows", "positives", "mean score", "AUC", *(["GAUC"] if whole.gauc is not None else []), "log loss", "NE", "PCOC"]


def _row(name: str, own: Summary, share: float = 0) -> list[str]:
    return [
        escape(name),
        f"{own.rows:,}{inline_bar(share)}",
        f"{own.positive_rate:.2%}",
        f"{own.mean_score:.2%}",
        number(own.auc),
        *([] if own.gauc is None else [number(own.gauc)]),
        number(own.logloss),
        number(own.ne),
        number(own.pcoc, 3),
    ]


def replay_page(replay: Replay) -> str:
    """HTML page of a replay."""
    parity = replay.parity
    served, answered = (
        ", ".join(f"{name} {version} ({n:,} requests)" for (name, version), n in found.items())
        for found in (replay.served, replay.answered)
    )
    facts = {
        "Log": replay.log,
        "Served by": served,
        f"Scored again by {replay.kind}": f"{answered}, {replay.source}",
        "Spec digest": replay.spec_digest or "not told by the endpoint",
        "Time": f"{replay.seconds:.1f} s, {parity.num_requests / replay.seconds:,.0f} requests/s",
        **({} if replay.joined is None else {"Labels": ", ".join(f"{n:,} {name}" for name, n in replay.joined.as_dict().items())}),
    }
    differences = [[name, f"{count:,}{inline_bar(count / parity.num_scores)}"] for name, count in parity.histogram() if count]
    sections = [
        _parity_verdict(replay),
        _parity_tiles(replay),
        _gate(replay),
        *_skew(replay),
        table_section("Score differences", ["difference", "scores"], differences, narrow=True),
    ]
    for task, again in replay.again.items():
        logged, now = replay.logged[task].summary(), again.summary()
        sections += [
            f"<h2>Quality: {escape(task)}</h2>",
            f'<p class="verdict">{verdict(now, task)}</p>',
            quality_section(again, now),
            table_section("As served and scored again", ["scores", *_heads(now)], [_row("as served", logged), _row("scored again", now)]),
        ]
    return page(replay.log, "Replay", [*sections, facts_section(facts), *([glossary()] if replay.again else [])])


def _parity_verdict(replay: Replay) -> str:
    parity, worst = replay.parity, replay.parity.worst
    badge = _badge(replay.passed)
    if parity.within(replay.tolerance):
        text = f"Every one of {parity.num_scores:,} logged scores came out the same, to within {replay.tolerance:g}."
        failed = [check.name for check in replay.checks if not check.passed]
        if failed:
            text += f" Failed: {escape(', '.join(failed))}."
    else:
        text = f"Scores came out differently: by up to {parity.largest:.3g}, where {replay.tolerance:g} is allowed."
    place = ""
    if worst is not None and not replay.passed:
        place = (
            f'<p class="hint">Largest in request <code>{escape(worst.request_id)}</code>, candidate {worst.index}: '
            f"{worst.logged:.9g} as served, {worst.again:.9g} now.</p>"
        )
    return f'<p class="verdict">{badge} {text}</p>{place}'


def _gate(replay: Replay) -> str:
    rows = [[escape(check.name), f"{check.found:.3g}", f"{check.allowed:g}", _badge(check.passed)] for check in replay.checks]
    return table_section("Gate", ["check", "found", "allowed", "verdict"], rows)


def _skew(replay: Replay) -> Iterable[str]:
    """Features as logged against the snapshot's."""
    if replay.skew is None:
        return
    rows = []
    for name, own in replay.skew.columns.items():
        first = next(iter(own.examples.values()), None)
        place = "" if first is None or first.candidate is None else f", candidate {first.candidate}"
        shown = "" if first is None else f"{first.request_id}{place}: {first.logged} logged, {first.expected} expected"
        counts = (own.compared, own.shifted, own.defaulted, own.unexpected, own.future, own.blamed)
        rows.append([escape(name), *(f"{count:,}" for count in counts), escape(shown)])
    heads = ["feature", "values", "shifted", "defaulted", "unexpected", "from the future", "requests blamed on it", "first"]
    yield table_section("Features as logged against the snapshot", heads, rows)
    if not replay.skew.checks_future:
        yield '<p class="hint">The snapshots have no times, so values from the future cannot be told.</p>'


def _badge(passed: bool) -> str:
    return '<span class="badge good">PASS</span>' if passed else '<span class="badge bad">FAIL</span>'


def _parity_tiles(replay: Replay) -> str:
    parity = replay.parity
    return tiles(
        {
            "Largest difference": (f"{parity.largest:.2g}", f"tolerance {replay.tolerance:g}"),
            "Mean difference": (f"{parity.mean:.2g}", f"of {parity.num_scores:,} scores"),
            "Requests": (f"{parity.num_requests:,}", f"{parity.num_candidates:,} candidates"),
            "Rank changed": (f"{parity.num_flipped:,}", "candidates"),
            "Order changed": (f"{parity.num_reordered:,}", "requests"),
            "Best changed": (f"{parity.num_top_changed:,}", "requests"),
        }
    )


def _score_range(quality: Quality) -> float:
    """Where the histogram ends: above all but a thousandth of the scores, and never beyond 1."""
    fine = quality.histogram.equal_mass(1000)
    return min(1.0, float(fine.high_K[-2] if len(fine.high_K) > 900 else fine.high_K[-1])) if len(fine.high_K) else 1.0
