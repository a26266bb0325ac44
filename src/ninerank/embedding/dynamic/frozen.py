"""A dynamic table that is only read: the ids and rows of a trained one, as a bundle serves them.

The ids lie in rising order, as they were written, and stay mapped from their file. Beside them an index of 4 bytes a slot, at most
half full, says where an id may be; the id itself decides. It is built when the table is made (some 20 ms for a million ids), takes
8 to 16 bytes an id, and answers as fast as a map that holds the ids once more in 16-byte slots: both touch one line of memory for an
id that is not there and two for one that is, and ask for these lines ahead.

Shape legend: I ids, N looked-up ids, D embedding dim of a group.
"""

import secrets
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from ninerank.embedding.dynamic.idmap import Ints, home
from ninerank.embedding.dynamic.native import AHEAD, prefetch
from ninerank.errors import DataError, SpecError
from ninerank.features.encoding import MAX_TABLE_ROWS, MISSING_ID
from ninerank.features.native import jit

__all__ = ["FrozenTable"]

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


class FrozenTable:
    """Rows of known ids: id number i of the list has row i + 1, any other id and `MISSING_ID` the default row 0, which is zeros.

    id_I: int64 in rising order. rows: float32 (I + 1, D) of each group, row 0 first. Both are shared, not copied, and may be mapped from
    files. Any number of threads may read. Raises SpecError for ids and rows that do not fit.

    >>> table = FrozenTable("item", torch.tensor([-1, 7]), {"deep": torch.tensor([[0.0], [1.0], [2.0]])})
    >>> row_N = table.prepare(torch.tensor([7, 8, -1]))
    >>> row_N.tolist(), table.rows("deep", row_N).tolist()
    ([2, 0, 1], [[2.0], [0.0], [1.0]])
    """

    def __init__(self, name: str, id_I: Tensor, rows: Mapping[str, Tensor]) -> None:
        self.name = name
        self.dims = {group: values.shape[-1] for group, values in rows.items()}
        self._check(id_I, rows)
        self._rows = dict(rows)
        self._ids: Ints = id_I.numpy()
        bits = max(MIN_BITS, (2 * len(self._ids) - 1).bit_length())
        self._key, self._shift = (
            np.uint64(secrets.randbits(64)),
            np.uint64(64 - bits),
        )  # drawn, so that no client can choose ids that collide
        self._slots: npt.NDArray[np.int32] = np.zeros(1 << bits, np.int32)
        _enter(self._ids, self._slots, self._key, self._shift)

    @classmethod
    def of_state(cls, name: str, state: Mapping[str, Tensor]) -> Self:
        """A frozen copy of a table whose `state()` this is: tensor "id" in rising order, and "value.<group>" with a row for each.

        >>> table = FrozenTable.of_state("item", {"id": torch.tensor([3]), "value.deep": torch.ones(1, 2), "count": torch.ones(1)})
        >>> table.rows("deep", table.prepare(torch.tensor([3, 4]))).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
        """
        id_I, present = state["id"], state["id"] != MISSING_ID
        groups = {key.removeprefix("value."): values for key, values in state.items() if key.startswith("value.")}
        if not bool(present.all()):
            id_I, groups = id_I[present], {group: values[present] for group, values in groups.items()}
        return cls(name, id_I, {group: functional.pad(values, (0, 0, 1, 0)) for group, values in groups.items()})

    def _check(self, id_I: Tensor, rows: Mapping[str, Tensor]) -> None:
        if id_I.dtype != torch.int64 or id_I.dim() != 1 or id_I.device.type != "cpu" or not id_I.is_contiguous():
            raise SpecError(f"table {self.name!r}: ids are {id_I.dtype} {tuple(id_I.shape)}; a list of int64 on the host is needed")
        if len(id_I) >= MAX_TABLE_ROWS:
            raise SpecError(f"table {self.name!r}: {len(id_I)} ids; fewer than {MAX_TABLE_ROWS} are allowed")
        if len(id_I) and (int(id_I[0]) == MISSING_ID or not bool((id_I[1:] > id_I[:-1]).all())):
            raise SpecError(f"table {self.name!r}: ids must rise strictly, from {MISSING_ID + 1} ({MISSING_ID} stands for missing)")
        for group, values in rows.items():
            if values.dtype != torch.float32 or values.dim() != 2 or values.shape[0] != len(id_I) + 1:
                held = f"{values.dtype} {tuple(values.shape)}"
                raise SpecError(f"table {self.name!r}: rows of {group!r} are {held}; float32 of {len(id_I) + 1} rows are needed")
            if bool(values[0].any()):
                raise SpecError(f"table {self.name!r}: row 0 of {group!r}, which ids without a row read, is not zero")

    def __len__(self) -> int:
        """Ids that have a row."""
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        """int64 (I,), rising."""
        return torch.from_numpy(self._ids)

    @property
    def num_index_bytes(self) -> int:
        """Memory that the index takes beside ids and rows."""
        return self._slots.nbytes

    def to(self, device: torch.device) -> Self:
        """Move the rows to `device`; ids are looked up on the host."""
        self._rows = {group: values.to(device) for group, values in self._rows.items()}
        return self

    def values(self, group: str) -> Tensor:
        """Rows (I + 1, D) of a group, row 0 the default."""
        return self._rows[group]

    def prepare(self, ids: Tensor, *, step: int | None = None) -> Tensor:
        """Rows (int64, of the shape of `ids`) of raw ids (int64, on the host). Raises DataError for ids of another type."""
        if step is not None:
            raise ValueError(f"table {self.name!r}: step {step}; a frozen table is only read, outside of any step")
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise DataError(f"table {self.name!r}: ids are {ids.dtype} on {ids.device}; int64 on cpu is needed")
        wanted = ids.contiguous().view(-1).numpy()
        found = np.empty(len(wanted), np.int64)
        _find(self._ids, self._slots, self._key, self._shift, wanted, found)
        return torch.from_numpy(found).view(ids.shape)

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        """Values (*row_N.shape, D) of rows that `prepare` gave."""
        return functional.embedding(row_N, self._rows[group])
