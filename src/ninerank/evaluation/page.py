"""Pieces of a self-contained HTML page: no scripts, nothing loaded from elsewhere, light and dark.

Texts given to these functions are plain and get escaped here; what is called html or svg is put in as it is.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from importlib.resources import files
from pathlib import Path

from ninerank import __version__
from ninerank.errors import DataError
from ninerank.files import replacing

__all__ = [
    "chart_card",
    "check_writable",
    "facts_section",
    "glossary",
    "inline_bar",
    "number",
    "page",
    "table_section",
    "tiles",
    "write_text",
]

GLOSSARY = {
    "AUC": "chance that a random positive row scores above a random negative one; 0.5 is guessing, 1 is perfect",
    "GAUC": "AUC within each group (user, request), averaged by the rows of the groups that hold both classes",
    "Log loss": "mean penalty for improbable answers, in nats; lower is better",
    "NE": "log loss divided by that of always predicting the average rate; below 1 is better than the average",
    "PCOC": "predicted over observed positives; 1 is calibrated, 1.1 predicts 10% too many",
    "ECE": "mean distance between predicted and observed rate over 20 buckets of equal size",
}


def tiles(numbers: Mapping[str, tuple[str, str]]) -> str:
    """Big numbers: name -> (number, note)."""
    cards = [
        f'<div class="card tile"><div class="name">{escape(name)}</div><div class="number">{escape(number)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for name, (number, note) in numbers.items()
    ]
    return f'<div class="tiles">{"".join(cards)}</div>'


def chart_card(title: str, hint: str, svg: str) -> str:
    """A chart with a title and a line that says how to read it."""
    return f'<figure class="card"><h3>{escape(title)}</h3><div class="hint">{escape(hint)}</div>{svg}</figure>'


def table_section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool = False, narrow: bool = False) -> str:
    """A table whose first column names the row; cells are html; no heading without a title.

    whole: the first row is the sum of the others. narrow: few columns.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr{' class=all' if whole and place == 0 else ''}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
        for place, row in enumerate(rows)
    )
    style = "card scroll narrow" if narrow else "card scroll"
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{heading}<div class="{style}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def inline_bar(share: float) -> str:
    """A bar beside a number in a table, its length `share` of the longest one's."""
    return f'<span class="bar" style="width:{max(2, round(56 * share))}px"></span>' if share > 0 else ""


def facts_section(facts: Mapping[str, str]) -> str:
    """Names and values of what was measured."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<h2>What was measured</h2><dl class="card">{rows}</dl>'


def glossary(names: Sequence[str] = tuple(GLOSSARY)) -> str:
    """What the metrics mean."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(GLOSSARY[name])}</dd>" for name in names)
    return f'<h2>How to read the numbers</h2><dl class="card">{rows}</dl>'


def page(title: str, kind: str, sections: Iterable[str]) -> str:
    """The whole document; sections are html."""
    style = files("ninerank.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(kind)}: {escape(title)}</title><style>{style}</style>'
    )
    body = f'<h1>{escape(title)}</h1><div class="kind">{escape(kind)}, {made}</div>{"".join(sections)}'
    footer = f"<footer>Written by Ninerank {__version__}.</footer>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}{footer}</main></body></html>\n'


def check_writable(path: Path | None) -> None:
    """Raise DataError if a file cannot be written at `path` (None: nothing is to be written), before much work is done for it."""
    if path is None:
        return
    if path.is_dir():
        raise DataError(f"{path}: is a directory; the name of a file is needed")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise DataError(f"{path}: cannot be written, {place} is no directory that may be written to")


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name that is renamed once it is whole; makes its directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def number(value: float, digits: int = 4) -> str:
    """Fixed digits, a dash for what has no value."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
