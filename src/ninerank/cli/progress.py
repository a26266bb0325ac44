"""A progress bar on standard error, at a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(label: str, total: int | None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Gives the function to call with how many more are done. total: None where it is not known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    counts = (MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), *counts, console=console, transient=True, disable=not console.is_terminal
    )
    with bars:
        task = bars.add_task(label, total=total)
        yield lambda more: bars.advance(task, more)
