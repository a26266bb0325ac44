"""A metric by the values of a column: one accumulator for each value, made when the value first occurs.

Shape legend: B rows of one update.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Self

from ninerank.errors import DataError
from ninerank.metrics.accumulator import Accumulator, under
from ninerank.metrics.rows import Array

__all__ = ["Sliced", "time_slices"]

Metric = TypeVar("Metric", bound=Accumulator)


class Sliced(Generic[Metric]):
    """A metric of each slice: `update` takes the column to slice by, then what the metric takes. Merges slice by slice.

    make: makes the metric of one slice. max_slices: more different values than this are refused with DataError, so that
    an id column cannot fill the memory.

    >>> from ninerank.metrics import PCOC
    >>> by_device = Sliced(PCOC).update(["phone", "tv", "phone"], [1, 1, 0], [0.5, 0.2, 0.5])
    >>> by_device.value()
    {'phone': 1.0, 'tv': 0.2}
    """

    def __init__(self, make: Callable[[], Metric], max_slices: int = 10_000) -> None:
        self.make, self.max_slices = make, max_slices
        self.metrics: dict[Hashable, Metric] = {}

    def update(self, slice_B: ArrayLike, *columns_B: ArrayLike | None, **named_B: ArrayLike | None) -> Self:
        values, place_B = np.unique(np.asarray(slice_B), return_inverse=True)
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise DataError("a slice of nan: give rows without a value one of their own first")
        positional = [None if column is None else np.asarray(column) for column in columns_B]
        named = {name: None if column is None else np.asarray(column) for name, column in named_B.items()}
        for column in (*positional, *named.values()):
            if column is not None and len(column) != len(place_B):
                raise DataError(f"a column of {len(column)} rows is sliced by one of {len(place_B)}: one value per row is needed")
        order = np.argsort(place_B, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(place_B, minlength=len(values)))])
        for value, start, end in zip(values.tolist(), bounds, bounds[1:], strict=False):
            own = order[start:end]
            self._of(value).update(  # type: ignore[attr-defined]
                *(None if column is None else column[own] for column in positional),
                **{name: None if column is None else column[own] for name, column in named.items()},
            )
        return self

    def merge(self, other: Self) -> Self:
        for value, metric in other.metrics.items():
            self._of(value).merge(metric)
        return self

    def value(self) -> dict[Hashable, float]:
        """The metric of each slice, by ascending value."""
        return {value: self.metrics[value].value() for value in sorted(self.metrics)}  # type: ignore[attr-defined,type-var]

    def state(self) -> dict[str, Array]:
        """The slices' values and the states of their metrics, each column under the number of its slice."""
        found: dict[str, Array] = {"values": np.array(list(self.metrics))}
        for number, metric in enumerate(self.metrics.values()):
            found |= {f"{number}.{key}": column for key, column in metric.state().items()}
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, Array], make: Callable[[], Metric]) -> Self:
        """The slicing whose `state()` this is; `make` makes one of its metrics, which tells their kind."""
        metric, kind = cls(make), type(make())
        for number, value in enumerate(np.asarray(state["values"]).tolist()):
            metric.metrics[value] = kind.from_state(under(state, f"{number}."))
        return metric

    def _of(self, value: Hashable) -> Metric:
        if value not in self.metrics:
            if len(self.metrics) >= self.max_slices:
                raise DataError(
                    f"slice {value!r} would be number {self.max_slices + 1}: at most {self.max_slices} are kept; cut the column into ranges"
                )
            self.metrics[value] = self.make()
        return self.metrics[value]


def time_slices(time_B: ArrayLike, width: float) -> Array:
    """Start of the window of `width` that each time lies in, for `Sliced`; both in one unit, seconds for instance.

    >>> time_slices([0, 59, 3600, 3700], 3600).tolist()
    [0, 0, 3600, 3600]
    """
    if not width > 0:
        raise DataError(f"a window of width {width}: a number above 0 is needed")
    time = np.asarray(time_B)
    start: Array = time // width * width
    return start
