"""The ids of a dynamic table that is only read, as a bundle serves them: id number i of a rising list has row i + 1.

The list stays mapped from its file. Beside it an index of 4 bytes a slot, at most half full, says where an id may be; the id itself
decides. It is built when the bundle is loaded (some 20 ms for a million ids), takes 8 to 16 bytes an id, and answers about as fast as
a map that holds the ids once more in 16-byte slots: both ask ahead for the memory they are going to touch.

Shape legend: I ids, D embedding dim of a group.
"""

import secrets
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ninerank.embedding.dynamic.idmap import Ints, home
from ninerank.embedding.dynamic.native import AHEAD, prefetch
from ninerank.errors import SpecError
from ninerank.features.encoding import MAX_TABLE_ROWS, MISSING_ID
from ninerank.features.native import jit

__all__ = ["FrozenIds", "freeze"]

MIN_BITS = 4


@jit
def _enter(ids, slots, key, shift):  # type: ignore[no-untyped-def]
    """Fill empty slots with the rows (position + 1) of distinct ids."""
    last, count = slots.shape[0] - 1, ids.shape[0]
    for i in range(count):
        if i + AHEAD < count:
            prefetch(slots, home(ids[i + AHEAD], key, shift))
        slot = home(ids[i], key, shift)
        while slots[slot] != 0:
            slot = (slot + 1) & last
        slots[slot] = i + 1


@jit
def _fetch(ids, slots, word, key, shift):  # type: ignore[no-untyped-def]
    """Ask for the id that the home slot of `word`, fetched before, names."""
    prefetch(ids, np.int64(max(slots[home(word, key, shift)], 1) - 1))


@jit
def _find(ids, slots, key, shift, wanted, out):  # type: ignore[no-untyped-def]
    """Row of each wanted id, 0 where there is none."""
    last, count, near = slots.shape[0] - 1, wanted.shape[0], AHEAD // 2
    for i in range(min(AHEAD, count)):
        prefetch(slots, home(wanted[i], key, shift))
    for i in range(min(near, count)):
        _fetch(ids, slots, wanted[i], key, shift)
    for i in range(count):
        if i + AHEAD < count:
            prefetch(slots, home(wanted[i + AHEAD], key, shift))
        if i + near < count:
            _fetch(ids, slots, wanted[i + near], key, shift)
        slot = home(wanted[i], key, shift)
        row = np.int64(slots[slot])
        while row != 0 and ids[row - 1] != wanted[i]:
            slot = (slot + 1) & last
            row = np.int64(slots[slot])
        out[i] = row


class FrozenIds:
    """Rows of known ids; any other id and `MISSING_ID` have row 0.

    id_I: int64, rising, on the host; shared, not copied. Any number of threads may read. Raises SpecError for ids that are no such list.

    >>> ids = FrozenIds("item", torch.tensor([-1, 7]))
    >>> ids.find(np.array([7, 8, -1])).tolist(), ids.num_rows
    ([2, 0, 1], 3)
    """

    def __init__(self, table: str, id_I: Tensor) -> None:
        if id_I.dtype != torch.int64 or id_I.dim() != 1 or id_I.device.type != "cpu":
            raise SpecError(f"table {table!r}: ids are {id_I.dtype} {tuple(id_I.shape)} on {id_I.device}; a list of int64 on cpu is needed")
        if len(id_I) >= MAX_TABLE_ROWS:
            raise SpecError(f"table {table!r}: {len(id_I)} ids; fewer than {MAX_TABLE_ROWS} are allowed")
        if len(id_I) and (int(id_I[0]) == MISSING_ID or not bool((id_I[1:] > id_I[:-1]).all())):
            raise SpecError(f"table {table!r}: ids must rise strictly, from {MISSING_ID + 1} ({MISSING_ID} stands for missing)")
        self.table = table
        self._ids: Ints = id_I.contiguous().numpy()
        bits = max(MIN_BITS, (2 * len(self._ids) - 1).bit_length())
        # The key is drawn, so that no client can choose ids that collide.
        self._key, self._shift = np.uint64(secrets.randbits(64)), np.uint64(64 - bits)
        self._slots: npt.NDArray[np.int32] = np.zeros(1 << bits, np.int32)
        _enter(self._ids, self._slots, self._key, self._shift)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_rows(self) -> int:
        """Rows of the table, row 0 included."""
        return 1 + len(self._ids)

    @property
    def num_index_bytes(self) -> int:
        """Memory that the index takes beside the ids."""
        return self._slots.nbytes

    def find(self, ids: Ints, out: Ints | None = None) -> Ints:
        """Row of each id (N,), 0 where there is none, in `out`, which may be `ids` itself."""
        found = np.empty(len(ids), np.int64) if out is None else out
        _find(self._ids, self._slots, self._key, self._shift, ids, found)
        return found


def freeze(state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids (I,) in rising order and each group's rows (I + 1, D), row 0 of zeros, from the values of a dynamic table.

    state: tensor "id", rising, and "value.<group>" with a row for each id. `MISSING_ID` is left out: it reads row 0.

    >>> freeze({"id": torch.tensor([3]), "value.deep": torch.ones(1, 2), "count": torch.ones(1)})
    (tensor([3]), {'deep': tensor([[0., 0.],
            [1., 1.]])})
    """
    id_I, first = state["id"], int(state["id"][:1].eq(MISSING_ID).sum())
    groups = {key.removeprefix("value."): values for key, values in state.items() if key.startswith("value.")}
    return id_I[first:], {group: functional.pad(values[first:], (0, 0, 1, 0)) for group, values in groups.items()}
