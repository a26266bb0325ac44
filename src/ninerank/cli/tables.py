"""Tables of metrics as the verbs print them."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ninerank.evaluation.quality import Summary

__all__ = ["number", "output", "quality_table"]

# Where nobody looks at it through a window, a table is as wide as it needs to be.
PIPE_WIDTH = 160


def output() -> "Console":
    """Console on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def quality_table(title: str, found: Mapping[str, "Summary"]) -> "Table":
    """One line a set of rows; GAUC only where there are groups."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    with_gauc = any(own.gauc is not None for own in found.values())
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold", min_width=8)
    for name in ("rows", "positive", "score", "AUC", *(["GAUC"] if with_gauc else []), "log loss", "NE", "PCOC", "ECE"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, own in found.items():
        gauc = [number(math.nan if own.gauc is None else own.gauc)] if with_gauc else []
        shares = [f"{own.positive_rate:.2%}", f"{own.mean_score:.2%}"]
        numbers = [number(own.logloss), number(own.ne), number(own.pcoc, 3), number(own.ece)]
        table.add_row(Text(name), f"{own.rows:,}", *shares, number(own.auc), *gauc, *numbers)
    return table


def number(value: float, digits: int = 4) -> str:
    """Fixed digits, a dash for what has no value."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
