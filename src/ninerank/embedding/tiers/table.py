"""An embedding table larger than device memory: the device holds a cache of its rows, with their optimizer state.

A training step is

    slots = table.prepare(ids, step=s)      rows that are missing come from the store, least used ones give up their slot
    table.prefetch(next_ids)                the next batch's missing rows are read while this one trains
    values = table.rows("deep", slots)      differentiable; loss.backward() leaves gradients in `gradients["deep"]`
    table.update()                          the fused rule changes values and state in the cache
    table.finish_step(s)

and gives, bit for bit, what the same operators give on a table that lies wholly in memory: a row's sum and update depend on the order of
the batch and not on where the row lies. No slot changes its row from `prepare` to `finish_step` of the same step.

N looked-up ids, R rows of the table, D embedding dim of a group.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.tiers.cache import RowCache, SlotGradients
from ninerank.embedding.tiers.config import TierConfig
from ninerank.embedding.tiers.slots import Found
from ninerank.embedding.tiers.statistics import TierStatistics
from ninerank.embedding.tiers.store import BLOCK_ROWS, Store
from ninerank.errors import DataError, SpecError
from ninerank.fusion.kernels.embedding_update import RowOptimizer
from ninerank.fusion.lookup import sequence

__all__ = ["TieredTable"]

VALUES = "value."


class TieredTable:
    """Rows 0 ... num_rows - 1 in groups of dims such as `{"deep": 16, "linear": 1}`; start values as those of a table in memory.

    first_row: of a larger table, whose rows from there on these are; it matters to start values alone. One thread calls it. Nothing is
    allocated or written before `train_with` or the first use. Reading (`step` None) is as exact as training, and does not count for what
    the cache keeps. Close the table, or use it as a context manager. Raises SpecError for sizes, and on first use for directories, that
    cannot be.

    >>> from ninerank.fusion.kernels.embedding_update import SGD
    >>> table = TieredTable("item", 100, {"deep": 4}, TierConfig(cache_rows=3), seed=1)
    >>> table.train_with(SGD(), 0.1)
    >>> for step in range(5):
    ...     slots = table.prepare(torch.tensor([step, step + 10, step]), step=step)
    ...     table.rows("deep", slots).sum().backward()
    ...     table.update()
    ...     table.finish_step(step)
    >>> table.statistics().evictions
    7
    >>> table.close()
    """

    def __init__(
        self,
        name: str,
        num_rows: int,
        dims: Mapping[str, int],
        config: TierConfig,
        *,
        seed: int,
        init_std: float = 0.01,
        first_row: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_rows < 1 or not dims or min(dims.values()) < 1:
            raise SpecError(f"table {name!r}: {num_rows} rows, dims {dict(dims)}; a row and a group of dim 1 or more are needed")
        if config.placement == "disk" and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name):
            raise SpecError(f"table {name!r}: on disk a name is made of letters, digits, '_', '.' and '-'")
        self.name, self.dims, self.config, self.seed, self.init_std = name, dict(dims), config, seed, init_std
        self.device = torch.device(device)
        self.first_row = first_row
        self.optimizer: RowOptimizer | None = None
        self.lr = 0.0
        self._num_rows = num_rows
        self._store: Store | None = None
        self._is_closed = False
        self._in_flight: dict[int, list[Ints]] = {}
        self._reading: list[Ints] = []
        self._hits = self._misses = 0
        self._first_row_T = torch.zeros(1, dtype=torch.int64, device=self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> tuple[Store, RowCache]:
        """Store and cache, made when they are first asked for."""
        if self._is_closed:
            raise RuntimeError(f"table {self.name!r} is closed")
        if self._store is None:
            sizes = (self.name, self._num_rows, self.dims, self.config, self.optimizer)
            self._store = Store(*sizes, lr=self.lr, seed=self.seed, init_std=self.init_std, first_row=self.first_row)
            self._begin(self._store)
        return self._store, self._cache

    def _begin(self, store: Store) -> None:
        self._cache = RowCache(store, self.config, self.device)
        self._gradients = {group: SlotGradients(self._cache) for group in self.dims}

    def train_with(self, optimizer: RowOptimizer, lr: float) -> None:
        """Keep the optimizer's state beside the rows, which start it now; values stay. Raises RuntimeError in the middle of a step."""
        self._check_between_steps("an optimizer is given")
        self.optimizer, self.lr = optimizer, lr
        if self._store is not None:
            self._end_cache()
            self._store.rebuild(optimizer, lr)
            self._begin(self._store)
        self._open()

    def move_to(self, device: torch.device | str) -> None:
        """Keep the cache on this device from now on. Raises RuntimeError in the middle of a step."""
        self._check_between_steps("the device is changed")
        self.device = torch.device(device)
        self._first_row_T = self._first_row_T.to(self.device)
        if self._store is not None:
            self._end_cache()
            self._begin(self._store)

    def _end_cache(self) -> None:
        self._cache.flush()
        self._cache.traffic.close()
        self._reading.clear()

    @property
    def gradients(self) -> Mapping[str, SlotGradients]:
        """Gradients by group since the last `zero_grad`; their rows are slots."""
        self._open()
        return self._gradients

    def num_rows(self, group: str) -> int:
        """Rows of the table; its slots on the device are no more."""
        return self._num_rows

    def prepare(self, ids: Tensor, *, step: int | None = None, times: Tensor | None = None) -> Tensor:
        """Slots (int64, of the shape of `ids`, on the host) of rows, which are on the device from here on; `times` makes no difference.

        They stay as they are until `finish_step(step)`, or, with step None, until the next `prepare`. Raises DataError, and changes
        nothing, for ids outside the table, and for more distinct ids than there are slots.
        """
        flat = self._checked(ids)
        store, cache = self._open()
        store.expect(in_order=False)
        self._end_reading()
        found = cache.slots.find(flat)
        self._check_room(cache, found)
        fresh = cache.load(found.missing_M)
        found.slot_N[found.position_A] = fresh[found.row_A]
        used = np.concatenate([found.present_P, fresh])
        cache.slots.pin(used)
        if step is None:
            self._reading.append(used)
        else:
            cache.slots.count(used)
            self._in_flight.setdefault(step, []).append(used)
        self._hits += len(found.present_P)
        self._misses += len(fresh)
        return torch.from_numpy(found.slot_N).view(ids.shape)

    def _checked(self, ids: Tensor) -> Ints:
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise DataError(f"table {self.name!r}: ids are {ids.dtype} on {ids.device}; int64 on cpu is needed")
        flat: Ints = ids.detach().reshape(-1).contiguous().numpy()
        if len(flat) and not 0 <= flat.min() <= flat.max() < self._num_rows:
            wrong = int(flat[np.argmax((flat < 0) | (flat >= self._num_rows))])
            raise DataError(f"table {self.name!r}: id {wrong} is outside its {self._num_rows} rows (valid: 0 to {self._num_rows - 1})")
        return flat

    def _check_room(self, cache: RowCache, found: Found) -> None:
        available = cache.slots.num_available(found)
        if len(found.missing_M) > available:
            held = cache.slots.num_slots - len(found.present_P) - available
            others = f", {held} of them in use by other batches in flight" if held else ""
            raise DataError(
                f"table {self.name!r}: a batch has {found.num_distinct} distinct ids, its cache {cache.slots.num_slots} rows{others}; "
                "give the tier more cache_rows, or train on smaller batches"
            )

    def prefetch(self, ids: Tensor) -> None:
        """Announce the ids of the next batch: what is missing of them is read on a background thread, if the tier has one.

        Ids that cannot be are passed over here; `prepare` says what is wrong with them.
        """
        if not self.config.prefetch:
            return
        try:
            flat = self._checked(ids)
        except DataError:
            return
        _, cache = self._open()
        cache.traffic.announce(cache.slots.absent(flat))

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        """Values (*row_N.shape, D) of slots that `prepare` gave; while a training step is open, the backward leaves gradients."""
        _, cache = self._open()
        values = cache.columns[f"{VALUES}{group}"].detach().requires_grad_(bool(self._in_flight))
        flat = row_N.reshape(-1).to(self.device)
        return sequence(values, flat, on_grad=self._gradients[group].add).view(*row_N.shape, self.dims[group])

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for gradients in self.gradients.values():
            gradients.clear()

    def update(self, lr_scale: float = 1.0) -> None:
        """Apply the optimizer to the rows with gradients, and forget these; nothing without gradients."""
        _, cache = self._open()
        if any(self._gradients.values()):
            if self.optimizer is None:
                raise RuntimeError(f"table {self.name!r} has gradients and no optimizer; call train_with first")
            for slots in (*(own for batches in self._in_flight.values() for own in batches), *self._reading):
                cache.mark(slots)
            lr_T = torch.tensor([self.lr * lr_scale], device=self.device)
            for group, gradients in self._gradients.items():
                state = [cache.columns[f"state.{group}.{name}"] for name in self.optimizer.state_names]
                gradients.apply(cache.columns[f"{VALUES}{group}"], state, self._first_row_T, lr_T, self.optimizer)
        self.zero_grad()

    def finish_step(self, step: int) -> None:
        """End a step: its slots may go. Raises RuntimeError if gradients are left, which `update` applies and `zero_grad` drops."""
        _, cache = self._open()
        if any(self._gradients.values()):
            raise RuntimeError(f"table {self.name!r}: step {step} ends with gradients left; call update or zero_grad first")
        for slots in self._in_flight.pop(step, []):
            cache.slots.unpin(slots)
        cache.slots.age()

    def _end_reading(self) -> None:
        while self._reading:
            self._cache.slots.unpin(self._reading.pop())

    def _check_between_steps(self, what: str) -> None:
        if self._in_flight:
            raise RuntimeError(f"table {self.name!r}: {what} in the middle of step {min(self._in_flight)}; call finish_step first")

    def flush(self) -> None:
        """Write every changed row of the cache to the store, and wait until it is there."""
        _, cache = self._open()
        cache.flush()

    def values_state(self) -> dict[str, Tensor]:
        """Values of all rows: `value.<group>` (R, D), on the host; views as in `state`."""
        return self._columns(VALUES)

    def state(self) -> dict[str, Tensor]:
        """Values and optimizer state of all rows: `value.<group>` (R, D), `state.<group>.<name>` (R, D) or (R,), on the host.

        Views of the store, of a mapped file where the table is on disk: they cost no memory, and show later steps as rows are written
        back. Copy what has to last.
        """
        return self._columns("")

    def state_to_fill(self) -> dict[str, Tensor]:
        """`state`, to be written to: the device forgets its rows, so that from here on the table is what is written there.

        Nothing is lost if nothing is written. Raises RuntimeError in the middle of a step.
        """
        self._check_between_steps("a state is loaded")
        columns = self._columns("")
        self._end_reading()
        self._cache.clear()
        return columns

    def _columns(self, only: str) -> dict[str, Tensor]:
        store, cache = self._open()
        cache.flush()
        store.expect(in_order=True)
        return store.columns(only)

    def state_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """`state` as copies, at most `rows` rows at a time, with the number of the first: for tables that do not fit in RAM.

        Take all blocks between two steps, or they show different ones.
        """
        store, cache = self._open()
        cache.flush()
        store.expect(in_order=True)
        return store.blocks(rows)

    def load_values(self, state: Mapping[str, Tensor]) -> None:
        """Take values of all rows, as `values_state` gives them; optimizer state and cache start afresh. Raises as `load_state` does."""
        self._load(state, VALUES)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take values and states of all rows, as `state` gives them, block by block; the cache starts afresh.

        Raises CheckpointError, and changes nothing, for a state that does not fit, and RuntimeError in the middle of a step.
        """
        self._load(state, "")

    def _load(self, state: Mapping[str, Tensor], only: str) -> None:
        self._check_between_steps("a state is loaded")
        store, cache = self._open()
        store.check(state, only)
        self._end_reading()
        cache.clear()
        store.load(state)

    def statistics(self) -> TierStatistics:
        """Size and traffic so far."""
        store, cache = self._open()
        traffic, num_bytes = cache.traffic, store.record.num_bytes
        return TierStatistics(
            *(self._num_rows, cache.slots.num_slots, cache.slots.used, self._hits, self._misses),
            *(traffic.rows_prefetched, cache.num_evictions, traffic.rows_read * num_bytes, traffic.rows_written * num_bytes),
        )

    def metrics(self) -> dict[str, float]:
        """`statistics` by name."""
        return self.statistics().as_metrics(f"table.{self.name}")

    def close(self) -> None:
        """End the thread; remove the table's directory, or flush and keep it, as configured. A closed table is of no use."""
        is_open, self._is_closed = self._store is not None and not self._is_closed, True
        if not is_open:
            return
        assert self._store is not None
        is_kept = False
        try:
            if self.config.keep:
                self._cache.flush()
            self._cache.traffic.close()
            is_kept = self.config.keep
        finally:
            self._store.close(keep=is_kept)
