"""Every item together with the one that follows it."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

__all__ = ["with_next"]

T = TypeVar("T")


def with_next(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Items with the one after each, None after the last. An error of `items` is raised in its place, after the item before it was used.

    >>> list(with_next("abc"))
    [('a', 'b'), ('b', 'c'), ('c', None)]
    """
    iterator = iter(items)
    held = list(islice(iterator, 1))
    while held:
        (item,) = held
        failure: Exception | None = None
        try:
            held = list(islice(iterator, 1))
        except Exception as error:  # noqa: BLE001 - raised again in its place
            held, failure = [], error
        yield item, held[0] if held else None
        if failure is not None:
            raise failure
