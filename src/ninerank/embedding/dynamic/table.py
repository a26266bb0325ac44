"""An embedding table of raw 64-bit ids: rows come and go with the ids that training meets.

A training step is

    rows = table.lookup(ids, train=True, step=s)     known ids -> rows; new ids are admitted, or read row 0
    values = table.rows("deep", rows)                differentiable; loss.backward() leaves gradients by row
    table.update()                                   duplicates summed once, then the rule updates the touched rows
    table.finish_step(s)                             counts age, rows are given up

Between `lookup` and `finish_step` no row is given up or changes its id. Row numbers are an inner matter: whatever order ids came in,
`state()` is by raw id, and equal histories of ids, steps and gradients give equal states.

Shape legend: N looked-up ids, V rows in use, K touched rows, D embedding dim of a group.
"""

import threading
import time
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ninerank.embedding.changes import Changes, column_of
from ninerank.embedding.dynamic.admission import admission
from ninerank.embedding.dynamic.config import DynamicTableConfig
from ninerank.embedding.dynamic.eviction import Alone, Capacity, EvictionConfig, Sharers, chosen
from ninerank.embedding.dynamic.idmap import IdMap, Ints
from ninerank.embedding.dynamic.intern import intern, occurrences
from ninerank.embedding.dynamic.lock import SharedLock
from ninerank.embedding.dynamic.rules import FusedRule
from ninerank.embedding.dynamic.state import check_state
from ninerank.embedding.dynamic.statistics import DynamicTableStatistics
from ninerank.embedding.dynamic.storage import RowStorage
from ninerank.embedding.pending import PendingGradients
from ninerank.errors import BundleError, DataError, SpecError
from ninerank.features.spec import MISSING_ID
from ninerank.fusion import lookup
from ninerank.fusion.kernels.embedding_update import RowOptimizer

__all__ = ["DynamicTable"]


class DynamicTable:
    """Rows of the ids that were admitted, one storage per group of equal dim, all addressed by the same row numbers.

    dims: dim of each group, e.g. `{"deep": 16, "linear": 1}`. rule: how `update` changes rows, and which state it keeps beside them; None
    for a table that is only read. `sharers`, to be set before the first step, hold the other rows of the table: `Capacity` counts all.
    Threads: any number may `lookup(train=False)` at once, beside one that trains; training calls and whatever reads `values` stay in one.

    >>> table = DynamicTable("item", {"deep": 4}, DynamicTableConfig(), seed=1)
    >>> table.lookup(torch.tensor([7, -1, 7]), train=True, step=0).tolist(), len(table)
    ([1, 2, 1], 2)
    >>> table.lookup(torch.tensor([-1, 8]), train=False).tolist()
    [2, 0]
    """

    def __init__(self, name: str, dims: Mapping[str, int], config: DynamicTableConfig, *, seed: int, rule: FusedRule | None = None) -> None:
        if not dims or min(dims.values()) < 1:
            raise SpecError(f"dynamic table {name!r}: dims {dict(dims)}; at least one group with a dim of at least 1 is needed")
        self.name, self.dims, self.config, self.seed, self.rule = name, dict(dims), config, seed, rule
        self.device = torch.device("cpu")
        self.sharers: Sharers = Alone()
        self.gradients = {group: PendingGradients(skip_row=0) for group in dims}
        self.version, self.generation = 1, 0
        self._lock = SharedLock()
        self._figures = threading.Lock()
        self._lookups = self._hits = self._admitted = self._rejected = self._evicted = 0
        self._begin()

    def _begin(self, expected: int = 0) -> None:
        self.storage = RowStorage(
            self.name, self.dims, self.rule, std=self.config.init_std, seed=self.seed, rows=max(self.config.reserve_rows, expected + 1)
        )
        self.ids = IdMap(expected)
        self.removed = IdMap()
        self.admission = admission(self.config.admission, seed=self.seed, table=self.name)
        self._open_steps: set[int] = set()
        self._tick = 0

    def __len__(self) -> int:
        """Ids that have a row."""
        return len(self.ids)

    def lookup(
        self, ids: Tensor, *, train: bool, step: int | None = None, now: float | None = None, missing: Tensor | None = None
    ) -> Tensor:
        """Rows (int64, of the shape of `ids`) of raw ids (int64, on the host); row 0 for ids without one and where `missing` (bool) is set.

        In training, `step` is the number of the step, and `now` the time in seconds where the table's clock counts these. Occurrences
        count within the whole call: make one call per step. Raises DataError for ids of another type.
        """
        if ids.dtype != torch.int64 or ids.device.type != "cpu":
            raise DataError(f"dynamic table {self.name!r}: ids are {ids.dtype} on {ids.device}; int64 on cpu is needed")
        tick = self._time(step, now) if train else 0
        present = None if missing is None else ~missing.numpy()
        raw = ids.detach().contiguous().numpy() if present is None else ids.detach().numpy()[present]
        if train:
            with self._lock.writing():
                assert step is not None
                found = self._admit(raw.reshape(-1), step, tick)
                self._open_steps.add(step)
        else:
            with self._lock.reading():
                found = self.ids.find(raw.reshape(-1))
            with self._figures:
                self._lookups += len(found)
                self._hits += int(np.count_nonzero(found))
        if present is None:
            return torch.from_numpy(found.reshape(ids.shape))
        rows = np.zeros(ids.shape, np.int64)
        rows[present] = found
        return torch.from_numpy(rows)

    def _time(self, step: int | None, now: float | None) -> int:
        if step is None or step < 0:
            raise ValueError(f"dynamic table {self.name!r}: step {step}; training needs the step's number, 0 or more")
        if self.config.clock == "steps":
            return step
        if now is None:
            raise ValueError(f"dynamic table {self.name!r}: its clock counts seconds, so `now` is needed")
        return int(now)

    def _admit(self, ids: Ints, step: int, tick: int) -> Ints:
        if self.config.admission.kind == "always":
            rows, fresh = self._intern(ids)
            self._start(rows[fresh], ids[fresh], tick)
            rejected = 0
        else:
            rows = self.ids.find(ids)
            fresh, rejected = self._decide(ids, rows, step, tick)
        self._tick = max(self._tick, tick)
        self.storage.touch(rows, tick, self.version)
        with self._figures:
            self._lookups += len(ids)
            self._rejected += rejected
            self._admitted += len(fresh)
            self._hits += len(ids) - rejected - int(self.storage.book["count"][rows[fresh]].sum())
        return rows

    def _decide(self, ids: Ints, rows: Ints, step: int, tick: int) -> tuple[Ints, int]:
        """Fill in the rows of ids that are admitted now; returns a position of each, and how many occurrences go without a row."""
        unknown = np.flatnonzero(rows == 0)
        if len(unknown) == 0:
            return unknown, 0
        which, counts, first = occurrences(ids[unknown])
        first = unknown[first]
        news = ids[first]
        admitted = self.admission.admit(news, counts, step)
        own = np.zeros(len(news), np.int64)
        own[admitted], _ = self._intern(news[admitted])
        self._start(own[admitted], news[admitted], tick)
        rows[unknown] = own[which]
        return first[admitted], int(counts[~admitted].sum())

    def _intern(self, ids: Ints) -> tuple[Ints, Ints]:
        """Rows of ids, which are all to have one, and the positions at which a new id got its row."""
        storage, ids_map = self.storage, self.ids
        rows, fresh = np.empty((2, len(ids)), np.int64)
        done = num_fresh = 0
        while True:
            done, size, storage.num_free, storage.used, num_fresh = intern(
                ids_map.slots, ids_map.key, ids_map.shift, ids, done, len(ids_map), ids_map.limit,
                storage.free, storage.num_free, storage.used, storage.num_rows, rows, fresh, num_fresh,
            )  # fmt: skip
            ids_map.resize(size)
            if done == len(ids):
                return rows, fresh[:num_fresh]
            if size >= ids_map.limit:
                ids_map.make_room(done, num_fresh, len(ids))
            else:
                storage.ensure(storage.num_rows + 1)

    def _start(self, rows: Ints, ids: Ints, tick: int) -> None:
        self.storage.open(rows, ids, tick)
        if len(self.removed):
            self.removed.remove(ids)

    def prepare(self, ids: Tensor, *, step: int | None = None, times: Tensor | None = None) -> Tensor:
        """Rows of a batch's raw ids, `MISSING_ID` among them; step: number of the training step, None to read alone.

        times (N,): occurrences that each of `ids` (N,) stands for, as if it came so often; one that stands for none is found if it has a
        row then, and counts nowhere.
        """
        if times is not None:
            rows = torch.empty_like(ids)
            is_counted = times > 0
            found = self.prepare(ids.repeat_interleave(times), step=step)
            rows[is_counted] = found[(times.cumsum(0) - times)[is_counted]]
            with self._lock.reading():
                rows[~is_counted] = torch.from_numpy(self.ids.find(ids[~is_counted].numpy()))
            return rows
        missing = ids == MISSING_ID
        return self.lookup(ids, train=step is not None, step=step, now=self._now(), missing=missing if bool(missing.any()) else None)

    def _now(self) -> float | None:
        return time.time() if self.config.clock == "seconds" else None

    def train_with(self, optimizer: RowOptimizer, lr: float) -> None:
        """Keep the optimizer's state beside the rows, which start it now."""
        values = self.values_state()
        self.rule = FusedRule(optimizer, lr)
        self._begin()
        if len(values["id"]):
            self.load_values(values)

    def num_rows(self, group: str) -> int:
        """Rows of the storage in use."""
        return self.storage.used

    def metrics(self) -> dict[str, float]:
        """`statistics` by name."""
        return self.statistics().as_metrics(f"table.{self.name}")

    def rows(self, group: str, row_N: Tensor) -> Tensor:
        """Values (*row_N.shape, D) of rows that `lookup` gave; the backward leaves gradients in `gradients[group]`."""
        is_trained = self.rule is not None and torch.is_grad_enabled()
        values_VD = self.values(group).requires_grad_(is_trained)
        flat_ND = lookup.sequence(values_VD, row_N.reshape(-1).cpu(), on_grad=self.gradients[group].add)
        return flat_ND.view(*row_N.shape, self.dims[group])

    def values(self, group: str) -> Tensor:
        """Storage (V, D) of a group, row 0 the default; a view that holds until the next lookup in training."""
        return self.storage.values(group)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for gradients in self.gradients.values():
            gradients.clear()

    def update(self, lr_scale: float = 1.0) -> None:
        """Apply the rule to the rows that backward passes left gradients for, and forget these."""
        for group, gradients in self.gradients.items():
            if gradients and self.rule is not None:
                with self._lock.writing():
                    self.rule.apply(self.values(group), self.storage.states(group), gradients, lr_scale)
                    self.storage.mark(gradients.rows().numpy(), self.version)
        self.zero_grad()

    def finish_step(self, step: int, now: float | None = None) -> int:
        """End step number `step`: counts age, and rows are given up if it is time. Returns how many.

        While another step is open (its lookup came ahead) nothing is given up until that one ends. Steps are numbered without gaps.
        now: the time in seconds, by default the clock's. Raises RuntimeError if gradients are left, whose rows might go to other ids:
        `update` applies them, `zero_grad` drops them.
        """
        tick = self._time(step, self._now() if now is None else now)
        if any(self.gradients.values()):
            raise RuntimeError(f"dynamic table {self.name!r}: step {step} ends with gradients left; call update or zero_grad first")
        with self._lock.writing():
            self._tick = max(self._tick, tick)
            self._open_steps.discard(step)
            self.admission.finish_step(step)
        if self._open_steps:
            return 0
        every = self.config.evict_every
        due = every > 0 and step % every == 0
        return self._evict([policy for policy in self.config.eviction if due or isinstance(policy, Capacity)])

    def evict(self, *policies: EvictionConfig) -> int:
        """Give up rows by the policies, or by all of the configuration's if none is named; returns how many. Ages run to the latest step,
        or time, that the table was told. Raises RuntimeError in the middle of a step.
        """
        self._check_between_steps("eviction")
        return self._evict(policies or self.config.eviction)

    def _evict(self, policies: Iterable[EvictionConfig]) -> int:
        with self._lock.writing():
            return sum(self._give_up(chosen(policy, self.storage.book, self._tick, self.sharers)) for policy in policies)

    def _check_between_steps(self, what: str) -> None:
        if self._open_steps:
            raise RuntimeError(f"dynamic table {self.name!r}: {what} in the middle of step {min(self._open_steps)}; call finish_step first")

    def remove(self, ids: Tensor) -> int:
        """Give up the rows of these ids, as far as they have one; returns how many. Raises RuntimeError in the middle of a step."""
        self._check_between_steps("removal")
        with self._lock.writing():
            rows = self.ids.find(np.unique(ids.numpy()))
            return self._give_up(rows[rows != 0])

    def _give_up(self, rows: Ints) -> int:
        ids = self.storage.book["id"][rows]
        order = np.argsort(ids)
        rows, ids = rows[order], ids[order]
        self.ids.remove(ids)
        self.storage.close(rows)
        if self.config.track_changes and len(ids):
            self.removed.put(ids, np.full(len(ids), self.version, np.int64))
        with self._figures:
            self._evicted += len(rows)
        return len(rows)

    def state(self) -> dict[str, Tensor]:
        """Everything that makes the model, by raw id in rising order; `dynamic.state` lists the tensors. Call between steps."""
        with self._lock.reading():
            rows = self.rows_by_id()
            block = self.storage.gather(rows, state=True)
            arrays = {"id": block.ids, **block.columns, **self.admission.state()}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def values_state(self) -> dict[str, Tensor]:
        """What scores: ids in rising order and the values of every group."""
        with self._lock.reading():
            block = self.storage.gather(self.rows_by_id(), state=False)
        return {name: torch.from_numpy(array) for name, array in {"id": block.ids, **block.columns}.items()}

    def load_values(self, state: Mapping[str, Tensor]) -> None:
        """Take what `values_state` gave in place of all that the table holds; the rest of each row starts afresh."""
        count = len(state.get("id", ()))
        whole = dict(state)
        for group in self.dims:
            start_KD = state.get(f"value.{group}")
            if self.rule is not None and start_KD is not None:
                whole |= {f"state.{group}.{name}": value for name, value in self.rule.new_state(start_KD).items()}
        whole |= {"last_seen": torch.full((count,), self._tick), "count": torch.ones(count, dtype=torch.int64)}
        fresh = admission(self.config.admission, seed=self.seed, table=self.name)
        whole |= {name: torch.from_numpy(array) for name, array in fresh.state().items()}
        self.load_state(whole)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take a state as `state` gives it in place of all that the table holds.

        Raises CheckpointError, and changes nothing, for a state that does not fit. Rows are laid out in the order of the ids. Changes
        since before cannot be told any more: delta export needs a new base.
        """
        columns = self.storage.columns(state=True)
        wanted = {name: (getattr(torch, column.dtype), (column.width,) if column.width else ()) for name, column in columns.items()}
        check_state(state, {"id": (torch.int64, ()), **wanted}, self.name)
        policy = admission(self.config.admission, seed=self.seed, table=self.name)
        policy.load_state({name: value.numpy() for name, value in state.items() if name.startswith("pending.")})
        with self._lock.writing():
            ids = np.ascontiguousarray(state["id"].numpy())
            self._begin(len(ids))
            self.admission = policy
            rows, _ = self._intern(ids)
            self.storage.enter(rows, ids, 0)
            self.storage.scatter(rows, {name: state[name].numpy() for name in columns})
            self._tick = int(state["last_seen"].max()) if len(ids) else 0
            self.generation += 1
            self.zero_grad()

    def apply(self, changes: Changes) -> None:
        """Take over changes that another table exported (`DynamicSource`); raises BundleError and changes nothing if they do not fit.

        Columns that were not exported start as in a new row, or stay as they are in a row that is known.
        """
        self._check_between_steps("applying changes")
        (ids, columns), removed = changes
        own = self.storage.columns(state=True)
        needed = [f"value.{group}" for group in self.dims]
        if any(own.get(name) != column_of(values) for name, values in columns.items()) or not columns.keys() >= set(needed):
            theirs = {name: column_of(values) for name, values in columns.items()}
            raise BundleError(f"dynamic table {self.name!r}: changes have the columns {theirs}; {needed} are needed, allowed are {own}")
        if "count" in columns and len(ids) and not 1 <= columns["count"].min() <= columns["count"].max() < 1 << 32:
            raise BundleError(f"dynamic table {self.name!r}: changes hold a count outside 1 ... {(1 << 32) - 1}")
        with self._lock.writing():
            gone = self.ids.find(removed)
            self._give_up(gone[gone != 0])
            rows, fresh = self._intern(ids)
            self._start(rows[fresh], ids[fresh], self._tick)
            self.storage.touch(rows[fresh], self._tick, self.version)
            self.storage.scatter(rows, columns)
            self.storage.mark(rows, self.version)

    def rows_by_id(self) -> Ints:
        """Rows of all ids, in rising order of these."""
        rows = self.storage.live()
        return rows[np.argsort(self.storage.book["id"][rows])]

    def close(self) -> None:
        """There is nothing but memory."""

    def statistics(self) -> DynamicTableStatistics:
        """Size and traffic so far."""
        capacities = [policy.max_rows for policy in self.config.eviction if isinstance(policy, Capacity)]
        storage = self.storage
        with self._figures:
            return DynamicTableStatistics(
                size=len(self),
                max_rows=min(capacities, default=0),
                num_slots=self.ids.num_slots,
                load_factor=self.ids.load_factor,
                pending=self.admission.num_pending,
                lookups=self._lookups,
                hits=self._hits,
                admitted=self._admitted,
                rejected=self._rejected,
                evicted=self._evicted,
                num_bytes=self.ids.num_bytes
                + self.removed.num_bytes
                + self.admission.num_bytes
                + storage.used * storage.row_bytes
                + storage.free.nbytes,
            )
