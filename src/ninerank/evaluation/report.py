"""One self-contained HTML page: no scripts, nothing loaded from elsewhere, readable without knowing the metrics."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path

from ninerank import __version__
from ninerank.evaluation.charts import calibration_chart, histogram_chart, percent, roc_chart
from ninerank.evaluation.evaluate import Evaluation, TaskEvaluation
from ninerank.evaluation.quality import Quality, Summary
from ninerank.evaluation.scorer import ModelInfo
from ninerank.features.atomic import replacing

__all__ = ["chart_card", "evaluation_page", "page", "quality_section", "tiles", "write_page"]

# Below this rate of positives scores crowd near 0 and are drawn on a square-root scale.
ROOT_SCALE_BELOW = 0.15
GLOSSARY = {
    "AUC": "chance that a random positive row scores above a random negative one; 0.5 is guessing, 1 is perfect",
    "GAUC": "AUC within each group (user, request), averaged by the rows of the groups that hold both classes",
    "Log loss": "mean penalty for improbable answers, in nats; lower is better",
    "NE": "log loss divided by that of always predicting the average rate; below 1 is better than the average",
    "PCOC": "predicted over observed positives; 1 is calibrated, 1.1 predicts 10% too many",
    "ECE": "mean distance between predicted and observed rate over 20 buckets of equal size",
}


def evaluation_page(evaluation: Evaluation) -> str:
    """HTML page of an evaluation."""
    model = evaluation.model
    title = f"{model.name} {model.version}"
    sections = [section for task in evaluation.tasks for section in task_sections(task, single=len(evaluation.tasks) == 1)]
    facts = {
        **model_facts(model),
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
        "AUC": (_number(summary.auc), "ranking, 1 is perfect"),
        **({} if summary.gauc is None else {"GAUC": (_number(summary.gauc), "ranking within groups")}),
        "Log loss": (_number(summary.logloss), "lower is better"),
        "NE": (_number(summary.ne), "below 1 beats the average"),
        "PCOC": (_number(summary.pcoc, 3), "predicted / observed"),
        "ECE": (_number(summary.ece), "calibration error"),
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
    with_gauc = whole.gauc is not None
    heads = ["rows", "positives", "mean score", "AUC", *(["GAUC"] if with_gauc else []), "log loss", "NE", "PCOC"]
    widest = max((own.rows for own in found.values()), default=1)
    body = [_slice_row("all", whole, with_gauc, 0, "all")]
    body += [_slice_row(value, own, with_gauc, own.rows / widest, "") for value, own in found.items()]
    head = "".join(f"<th>{escape(name)}</th>" for name in (column, *heads))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<h2>By {escape(column)}</h2><div class="card scroll">{table}</div>'


def _slice_row(value: str, own: Summary, with_gauc: bool, share: float, style: str) -> str:
    bar = f'<span class="bar" style="width:{max(2, round(56 * share))}px"></span>' if share else ""
    cells = [
        f"{own.rows:,}{bar}",
        f"{own.positive_rate:.2%}",
        f"{own.mean_score:.2%}",
        _number(own.auc),
        *([_number(math.nan if own.gauc is None else own.gauc)] if with_gauc else []),
        _number(own.logloss),
        _number(own.ne),
        _number(own.pcoc, 3),
    ]
    return f'<tr class="{style}"><td>{escape(value)}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def tiles(numbers: Mapping[str, tuple[str, str]]) -> str:
    """Big numbers: name -> (number, note)."""
    cards = [
        f'<div class="card tile"><div class="name">{escape(name)}</div><div class="number">{escape(number)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for name, (number, note) in numbers.items()
    ]
    return f'<div class="tiles">{"".join(cards)}</div>'


def chart_card(title: str, hint: str, svg: str) -> str:
    return f'<figure class="card"><h3>{escape(title)}</h3><div class="hint">{escape(hint)}</div>{svg}</figure>'


def model_facts(model: ModelInfo) -> dict[str, str]:
    return {
        "Model": f"{model.name} {model.version} ({model.kind})",
        "Source": model.source,
        "Spec digest": model.spec_digest or "not told by the endpoint",
    }


def facts_section(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<h2>What was measured</h2><dl class="card">{rows}</dl>'


def glossary(names: Sequence[str] = tuple(GLOSSARY)) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(GLOSSARY[name])}</dd>" for name in names)
    return f'<h2>How to read the numbers</h2><dl class="card">{rows}</dl>'


def page(title: str, kind: str, sections: Iterable[str]) -> str:
    """The whole document; sections are HTML, title and kind are plain text."""
    style = files("ninerank.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(kind)}: {escape(title)}</title><style>{style}</style>'
    )
    body = f'<h1>{escape(title)}</h1><div class="kind">{escape(kind)}, {made}</div>{"".join(sections)}'
    footer = f"<footer>Written by Ninerank {__version__}.</footer>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}{footer}</main></body></html>\n'


def write_page(path: str | Path, html: str) -> None:
    """Write the page under a temporary name and rename it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _score_range(quality: Quality) -> float:
    """Where the histogram ends: above all but a thousandth of the scores, and never beyond 1."""
    fine = quality.histogram.equal_mass(1000)
    return min(1.0, float(fine.high_K[-2] if len(fine.high_K) > 900 else fine.high_K[-1])) if len(fine.high_K) else 1.0


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
