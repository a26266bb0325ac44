"""The course of a run, one line an interval: `history.csv`, and TensorBoard where it is installed."""

import csv
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from typing_extensions import Self

from ninerank.errors import SpecError

__all__ = ["COLUMNS", "History"]

COLUMNS = ("step", "epoch", "samples", "loss", "lr", "grad_norm", "train_auc", "samples_per_s", "valid_auc", "valid_gauc", "valid_logloss")


class History:
    """Appends lines; on resume, lines after the checkpoint's step are dropped first."""

    def __init__(self, directory: Path, *, tensorboard: bool | Literal["auto"], keep_to_step: int) -> None:
        self.path = directory / "history.csv"
        kept = self._lines_to(keep_to_step) if keep_to_step else []
        self._file = self.path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(kept)
        self._file.flush()
        self._board = _summary_writer(directory / "tensorboard", tensorboard, keep_to_step)

    def write(self, row: Mapping[str, float | None]) -> None:
        """One line; `row` holds `step`, `epoch` and any of the other columns, None for what is not known."""
        self._writer.writerow({key: _text(row.get(key)) for key in COLUMNS})
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key not in {"step", "epoch"} and value is not None:
                    self._board.add_scalar(key.replace("valid_", "valid/"), value, int(row["step"] or 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _lines_to(self, step: int) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            return [
                row for row in csv.DictReader(stream) if set(row) == set(COLUMNS) and row["step"].isdecimal() and int(row["step"]) <= step
            ]


def _summary_writer(directory: Path, wanted: bool | Literal["auto"], step: int) -> Any:
    there = find_spec("tensorboard") is not None
    if wanted is False or (wanted == "auto" and not there):
        return None
    if not there:
        raise SpecError("log.tensorboard: TensorBoard is not installed; pip install 'ninerank[report]', or set log.tensorboard=false")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.8g}"
