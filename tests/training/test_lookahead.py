from collections.abc import Iterator

import pytest

from ninerank.training.lookahead import with_next


def test_ends() -> None:
    assert list(with_next([])) == []
    assert list(with_next([7])) == [(7, None)]
    assert list(with_next(range(3))) == [(0, 1), (1, 2), (2, None)]


def test_an_error_comes_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("gone")

    pairs = with_next(source())
    assert next(pairs) == (1, 2)
    assert next(pairs) == (2, None)
    with pytest.raises(OSError, match="gone"):
        next(pairs)


def test_no_more_than_one_item_ahead() -> None:
    source = iter(range(10))
    pairs = with_next(source)
    assert next(pairs) == (0, 1)
    assert next(source) == 2
