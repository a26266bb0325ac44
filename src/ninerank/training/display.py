"""What a person sees of a run: progress bars at a terminal, plain log lines elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typing_extensions import Self

__all__ = ["Display", "Stage"]

log = logging.getLogger("ninerank.training")
LINE_EVERY_S = 10.0


class Stage:
    """One thing that takes time: rows done out of `total`, and figures beside the bar."""

    def __init__(self, label: str, total: int | None, bars: Progress | None) -> None:
        self._label = label
        self._bars = bars
        self._total = total
        self._done = 0
        self._figures = ""
        self._line_s = time.monotonic()
        self._task = bars.add_task(label, total=total, figures="") if bars is not None else None

    def advance(self, num_rows: int) -> None:
        self._done += num_rows
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done)
        elif time.monotonic() - self._line_s > LINE_EVERY_S:
            self._line_s = time.monotonic()
            log.info("%s: %d of %s rows%s", self._label, self._done, self._total or "?", f", {self._figures}" if self._figures else "")

    def show(self, figures: str) -> None:
        self._figures = figures
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, figures=figures)

    def end(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)


class Display:
    """Bars on `console` if it is a terminal; without one, lines in the log `ninerank.training`."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bars: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bars = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def print(self, what: RenderableType) -> None:
        """Print on the console, if there is one, above the bars."""
        if self._console is not None:
            self._console.print(what)

    @contextmanager
    def stage(self, label: str, total: int | None) -> Iterator[Stage]:
        stage = Stage(label, total, self._bars)
        try:
            yield stage
        finally:
            stage.end()
