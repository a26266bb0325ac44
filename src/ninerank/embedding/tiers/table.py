"""An embedding table larger than device memory: the device holds a cache of its rows, with their optimizer state.

A training step is

    slots = table.prepare(ids, step=s)      rows that are missing come from the backing store, least used ones give up their slot
    table.prefetch(next_ids)                the next batch's missing rows are read while this one trains
    values = table.rows("deep", slots)      differentiable; loss.backward() leaves gradients pending
    table.update(1.0, None)                 the fused rule changes values and state in the cache
    table.finish_step(s)

and gives, bit for bit, what the same operators give on a table that lies wholly in memory: a row's sum and update depend on the order of
the batch and not on where the row lies. No slot changes its row from `prepare` to `finish_step` of the same step.

N looked-up ids, C cache rows, K moved rows, R rows of the table, D embedding dim of a group.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ninerank.embedding.dynamic.idmap import Ints
from ninerank.embedding.tiers.backing import Backing, DiskBacking, HostBacking
from ninerank.embedding.tiers.config import TierConfig
from ninerank.embedding.tiers.records import Record, start_blocks
from ninerank.embedding.tiers.scratch import Owner, OwnerColumn, ScratchDirectory
from ninerank.embedding.tiers.slots import Found, Slots
from ninerank.embedding.tiers.statistics import TierStatistics
from ninerank.embedding.tiers.traffic import Traffic
from ninerank.errors import CheckpointError, DataError, SpecError
from ninerank.fusion.kernels import storage
from ninerank.fusion.kernels.embedding_update import RowOptimizer
from ninerank.fusion.lookup import LookupGrad, sequence

__all__ = ["TieredTable"]

BLOCK_ROWS = 65_536


class TieredTable:
    """Rows 0 ... num_rows - 1 in groups of dims such as `{"deep": 16, "linear": 1}`; start values as those of a table in memory.

    One thread calls it. Reading (`step` None) is as exact as training, and does not count for what the cache keeps. Close the table, or
    use it as a context manager. Raises SpecError for sizes and directories that cannot be.

    >>> from ninerank.fusion.kernels.embedding_update import SGD
    >>> table = TieredTable("item", 100, {"deep": 4}, TierConfig(cache_rows=3), SGD(), lr=0.1, seed=1)
    >>> for step in range(5):
    ...     slots = table.prepare(torch.tensor([step, step + 10, step]), step=step)
    ...     table.rows("deep", slots).sum().backward()
    ...     table.update(1.0, None)
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
        optimizer: RowOptimizer,
        *,
        lr: float,
        seed: int,
        init_std: float = 0.01,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_rows < 1 or not dims or min(dims.values()) < 1:
            raise SpecError(
                f"table {name!r}: {num_rows} rows, dims {dict(dims)}; at least one row and one group of dim 1 or more are needed"
            )
        if config.placement == "disk" and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", name):
            raise SpecError(f"table {name!r}: on disk a name is made of letters, digits, '_', '.' and '-'")
        self.name, self.num_rows, self.dims, self.config, self.optimizer, self.lr = name, num_rows, dict(dims), config, optimizer, lr
        self.device = torch.device(device)
        self.record = Record.of(dims, optimizer)
        start = start_blocks(self.record, dims, optimizer, lr, seed=seed, table=name, num_rows=num_rows, std=init_std)
        self._backing: Backing
        if config.directory is None:
            self._backing = HostBacking(num_rows, self.record.num_words, start)
        else:
            scratch = ScratchDirectory(config.directory, self._owner(seed, init_std))
            self._backing = DiskBacking(scratch, num_rows, self.record.num_words, start)
        self._traffic = Traffic(self._backing.words, self.device, is_threaded=config.prefetch, name=name)
        cache_rows = min(config.cache_rows, num_rows)
        self._slots = Slots(cache_rows, config.decay)
        self._is_dirty = np.zeros(cache_rows, np.bool_)
        shapes = {column: (cache_rows, column.width) if column.width else (cache_rows,) for column in self.record.columns}
        self._cache = {column.name: storage.zeros(shape, column.dtype, self.device) for column, shape in shapes.items()}
        self._first_row_T = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._pending: dict[str, list[LookupGrad]] = {group: [] for group in dims}
        self._in_flight: dict[int, list[Ints]] = {}
        self._reading: list[Ints] = []
        self._hits = self._misses = self._evictions = 0

    def _owner(self, seed: int, init_std: float) -> Owner:
        columns = tuple(
            OwnerColumn(name=c.name, first_word=c.first_word, width=c.width, dtype="int32" if c.dtype == torch.int32 else "float32")
            for c in self.record.columns
        )
        rule = self.optimizer.canonical_json()
        return Owner(table=self.name, num_rows=self.num_rows, columns=columns, optimizer=rule, lr=self.lr, seed=seed, init_std=init_std)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def prepare(self, ids: Tensor, *, step: int | None) -> Tensor:
        """Slots (int64, of the shape of `ids`, on the host) of rows, which are on the device from here on.

        They stay as they are until `finish_step(step)`, or, with step None, until the next `prepare`. Raises DataError, and changes
        nothing, for ids outside the table, and for more distinct ids than there are slots.
        """
        flat = self._checked(ids)
        self._end_reading()
        found = self._slots.find(flat)
        self._check_room(found)
        fresh = self._load(found.missing_M)
        found.slot_N[found.position_A] = fresh[found.row_A]
        used = np.concatenate([found.present_P, fresh])
        self._slots.pin(used)
        if step is None:
            self._reading.append(used)
        else:
            self._slots.count(used)
            self._in_flight.setdefault(step, []).append(used)
        self._hits += len(found.present_P)
        self._misses += len(fresh)
        return torch.from_numpy(found.slot_N).view(ids.shape)

    def _checked(self, ids: Tensor) -> Ints:
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise DataError(f"table {self.name!r}: ids are {ids.dtype} on {ids.device}; int64 on cpu is needed")
        flat: Ints = ids.detach().reshape(-1).contiguous().numpy()
        if len(flat) and not 0 <= flat.min() <= flat.max() < self.num_rows:
            wrong = int(flat[np.argmax((flat < 0) | (flat >= self.num_rows))])
            raise DataError(f"table {self.name!r}: id {wrong} is outside its {self.num_rows} rows (valid: 0 to {self.num_rows - 1})")
        return flat

    def _check_room(self, found: Found) -> None:
        available = self._slots.num_available(found)
        if len(found.missing_M) > available:
            held = self._slots.num_slots - len(found.present_P) - available
            others = f", {held} of them in use by other batches in flight" if held else ""
            raise DataError(
                f"table {self.name!r}: a batch has {found.num_distinct} distinct ids, its cache {self._slots.num_slots} rows{others}; "
                "give the tier more cache_rows, or train on smaller batches"
            )

    def _load(self, rows: Ints) -> Ints:
        """Bring distinct missing rows, rising, into the cache; returns their slots."""
        if len(rows) == 0:
            return rows
        records = self._traffic.take(rows)
        victims = self._slots.victims(len(rows) - (self._slots.num_slots - self._slots.used))
        self._write_back(victims)
        self._evictions += len(victims)
        slots = self._slots.assign(rows, victims)
        place = torch.from_numpy(slots).to(self.device)
        records = records.to(self.device, non_blocking=True)
        for column in self.record.columns:
            self._cache[column.name].index_copy_(0, place, column.of(records))
        return slots

    def _write_back(self, slots: Ints) -> None:
        changed = slots[self._is_dirty[slots]]
        if len(changed):
            place = torch.from_numpy(changed).to(self.device)
            moved = {name: tensor.index_select(0, place) for name, tensor in self._cache.items()}
            self._traffic.put(self._slots.row[changed], self.record.pack(moved))
            self._is_dirty[changed] = False

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
        self._traffic.announce(self._slots.absent(flat))

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        """Values (*row_N.shape, D) of slots that `prepare` gave; while a training step is open, the backward leaves gradients pending."""
        values = self._cache[f"value.{group}"].detach().requires_grad_(bool(self._in_flight))
        flat = row_N.reshape(-1).to(self.device)
        return sequence(values, flat, on_grad=self._pending[group].append).view(*row_N.shape, self.dims[group])

    def pending(self, group: str) -> LookupGrad | None:
        """Gradients by slot since the last `zero_grad`, of all lookups together; None if there are none."""
        parts = self._pending[group]
        if len(parts) > 1:
            parts[:] = [LookupGrad.merged(parts)]
        return parts[0] if parts else None

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parts in self._pending.values():
            parts.clear()

    def update(self, lr_scale: float = 1.0, grad_scale: Tensor | None = None) -> None:
        """Apply the optimizer to the rows with gradients pending, each times `grad_scale`, and forget these."""
        grads = {group: self.pending(group) for group in self.dims}
        if all(grad is None for grad in grads.values()):
            return
        for slots in (*(s for batches in self._in_flight.values() for s in batches), *self._reading):
            self._is_dirty[slots] = True
        lr_T = torch.tensor([self.lr * lr_scale], device=self.device)
        for group, grad in grads.items():
            if grad is not None:
                state = [self._cache[f"state.{group}.{name}"] for name in self.optimizer.state_names]
                grad.apply(self._cache[f"value.{group}"], state, self._first_row_T, lr_T, self.optimizer, grad_scale=grad_scale)
        self.zero_grad()

    def finish_step(self, step: int) -> None:
        """End a step: its slots may go. Raises RuntimeError if gradients are left, which `update` applies and `zero_grad` drops."""
        if any(self._pending.values()):
            raise RuntimeError(f"table {self.name!r}: step {step} ends with gradients left; call update or zero_grad first")
        for slots in self._in_flight.pop(step, []):
            self._slots.unpin(slots)
        self._slots.age()

    def _end_reading(self) -> None:
        while self._reading:
            self._slots.unpin(self._reading.pop())

    def flush(self) -> None:
        """Write every changed row of the cache to the backing store, and wait until it is there."""
        changed = np.flatnonzero(self._is_dirty)
        for first in range(0, len(changed), BLOCK_ROWS):
            self._write_back(changed[first : first + BLOCK_ROWS])
        self._traffic.wait()

    def state(self) -> dict[str, Tensor]:
        """Values and optimizer state of all rows: `value.<group>` (R, D), `state.<group>.<name>` (R, D) or (R,), on the host.

        Views of the backing store, of a mapped file where the table is on disk: they cost no memory, and show later steps as rows are
        written back. Copy what has to last.
        """
        self.flush()
        return self.record.split(torch.from_numpy(self._backing.words))

    def state_blocks(self, rows: int = BLOCK_ROWS) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """`state` as copies, at most `rows` rows at a time, with the number of the first: for tables that do not fit in RAM.

        Take all blocks between two steps, or they show different ones.
        """
        state = self.state()
        for first in range(0, self.num_rows, rows):
            yield first, {name: tensor[first : first + rows].clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take values and states of all rows, as `state` gives them; the cache starts anew.

        Raises CheckpointError, and changes nothing, for a state that does not fit, and RuntimeError in the middle of a step.
        """
        if self._in_flight:
            raise RuntimeError(
                f"table {self.name!r}: a state is loaded in the middle of step {min(self._in_flight)}; call finish_step first"
            )
        self._check_state(state)
        self._traffic.drop()
        self._end_reading()
        self._slots.clear()
        self._is_dirty[:] = False
        for first in range(0, self.num_rows, BLOCK_ROWS):
            block = {name: tensor[first : first + BLOCK_ROWS].detach().cpu() for name, tensor in state.items()}
            self._backing.write(first, self.record.pack(block).numpy())

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        names = [column.name for column in self.record.columns]
        for key in sorted(state.keys() ^ set(names)):
            where = "is missing" if key in names else "is not of this table"
            raise CheckpointError(f"table {self.name!r}: {key!r} {where}; needed: {', '.join(names)}")
        for column in self.record.columns:
            met, shape = state[column.name], (self.num_rows, column.width) if column.width else (self.num_rows,)
            if met.dtype != column.dtype or tuple(met.shape) != shape:
                raise CheckpointError(
                    f"table {self.name!r}: {column.name!r} is {met.dtype} {tuple(met.shape)}, {column.dtype} {shape} is needed"
                )

    def statistics(self) -> TierStatistics:
        """Size and traffic so far."""
        traffic, num_bytes = self._traffic, self.record.num_bytes
        return TierStatistics(
            *(self.num_rows, self._slots.num_slots, self._slots.used, self._hits, self._misses, traffic.rows_prefetched, self._evictions),
            *(traffic.rows_read * num_bytes, traffic.rows_written * num_bytes),
        )

    def close(self) -> None:
        """End the thread; remove the table's directory, or flush and keep it, as configured. The table is of no use after."""
        if self._traffic.is_closed:
            return
        if self.config.keep:
            self.flush()
        self._traffic.close()
        self._backing.close(keep=self.config.keep)
