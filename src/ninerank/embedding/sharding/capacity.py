"""Which rows a table over several processes gives up when it is too large: those that one process would, found without moving rows."""

import numpy as np
import numpy.typing as npt
import torch

from ninerank.embedding.dynamic.eviction import Keys, smallest
from ninerank.embedding.sharding.exchange import global_sum

__all__ = ["Everyone"]

LEAST, GREATEST = int(np.iinfo(np.int64).min), int(np.iinfo(np.int64).max)


class Everyone:
    """All processes of the default group, each with its part of the table; every method is a collective call."""

    def total(self, own_rows: int) -> int:
        return int(global_sum(torch.tensor(own_rows)))

    def smallest(self, count: int, *keys: Keys) -> npt.NDArray[np.int64]:
        """By bisection: whether so many entries of all processes lie below a value is one sum of one number.

        Where the first key leaves ties at the bound, the next one decides among them, and so on. Keys together tell all entries apart.
        """
        places = smallest(count, *keys)  # no other entry of this process can be among them
        chosen: list[npt.NDArray[np.int64]] = []
        for key in keys:
            values = np.sort(key[places].astype(np.int64))

            def below(bound: int, values: npt.NDArray[np.int64] = values) -> int:
                return self.total(int(np.searchsorted(values, bound, side="right")))

            low, high = LEAST, GREATEST
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if below(middle) >= count else (middle + 1, high)
            own = key[places].astype(np.int64)
            chosen.append(places[own < low])
            count -= self.total(len(chosen[-1]))
            places = places[own == low]
        chosen.append(places)
        return np.concatenate(chosen)
