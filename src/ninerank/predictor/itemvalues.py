"""What a model computes of an item alone, kept from request to request.

A compiled graph is cut in two (`fusion.precompute`): values of an item, such as the item half of a split first layer or an item tower,
and the rest, which reads them, and perhaps embeddings of the item besides. The values stay here by the key that the caller gives an
item, up to a number of bytes; beyond it the ones not asked for lately go first (CLOCK). They belong to one engine, and so to one
version of one model: another version has another store, and nothing is left of the old one.

Shape legend: N candidates, M of them not kept yet, B rows, D numbers of a value.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from ninerank.embedding.collection import EmbeddingCollection
from ninerank.embedding.dynamic.idmap import IdMap
from ninerank.embedding.request import RequestLookup
from ninerank.features.batch import Block
from ninerank.fusion.backends import AUTO, Precision, lower
from ninerank.fusion.capture import GraphInput
from ninerank.fusion.compile import PassRecord, graph_for_one
from ninerank.fusion.precompute import PREFIX, precompute_items
from ninerank.fusion.roles import USER_ROW

__all__ = ["ItemScorer", "ItemStore", "NoItemValuesError"]

Ints = npt.NDArray[np.int64]
CPU = torch.device("cpu")
INDEX_BYTES = 64  # of an item besides its values: slots of the map at their emptiest, key, mark


class NoItemValuesError(Exception):
    """What a model reads of an item has no fixed size, or there is nothing."""


class ItemStore:
    """Values of items by key, rows of one tensor a value. Any number of threads may use it.

    values: name and shape of each value, (B, ...). dtypes: what they are kept in. capacity_bytes: bound of all of it.
    """

    def __init__(self, values: Sequence[GraphInput], dtypes: Mapping[str, torch.dtype], capacity_bytes: int) -> None:
        shapes = [tuple(size for size in value.dims[1:] if isinstance(size, int)) for value in values]
        kept = [dtypes.get(value.name, value.dtype) for value in values]
        self.bytes_per_item = INDEX_BYTES + sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, kept, strict=True))
        self.capacity = capacity_bytes // self.bytes_per_item
        if self.capacity < 1:
            raise ValueError(f"{capacity_bytes} bytes hold no item: one takes {self.bytes_per_item}")
        self._rows = [torch.empty((self.capacity, *shape), dtype=dtype) for shape, dtype in zip(shapes, kept, strict=True)]
        self._key: Ints = np.zeros(self.capacity, np.int64)
        self._was_used: npt.NDArray[np.bool_] = np.zeros(self.capacity, np.bool_)
        self._slots = IdMap()  # key -> slot + 1
        self._size = self._hand = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return self._size

    def read(self, key_N: Ints) -> tuple[list[Tensor], Ints]:
        """Values (N, ...) of items, and the places of those that are not here, whose rows are of no meaning; a negative key never is."""
        with self._lock:
            slot_N = self._slots.find(key_N) - 1
            slot_N[key_N < 0] = -1
            missing_M = np.flatnonzero(slot_N < 0)
            known_N = np.maximum(slot_N, 0)
            self._was_used[known_N] = True
            self.hits, self.misses = self.hits + len(key_N) - len(missing_M), self.misses + len(missing_M)
            places = torch.from_numpy(known_N)
            return [rows.index_select(0, places) for rows in self._rows], missing_M

    def keep(self, key_M: Ints, values: Sequence[Tensor]) -> None:
        """Keep values (M, ...) of items whose keys are not negative; of a key that comes twice, one."""
        key_K, first_K = np.unique(key_M, return_index=True)
        is_kept = key_K >= 0
        key_K, first_K = key_K[is_kept][: self.capacity], first_K[is_kept][: self.capacity]
        with self._lock:
            is_new = self._slots.find(key_K) == 0  # another thread may have been faster
            key_K, first_K = key_K[is_new], first_K[is_new]
            slot_K = self._free(len(key_K))
            self._slots.put(key_K, slot_K + 1)
            self._key[slot_K] = key_K
            places, source = torch.from_numpy(slot_K), torch.from_numpy(first_K)
            for rows, own in zip(self._rows, values, strict=True):
                rows.index_copy_(0, places, own.index_select(0, source).to(rows.dtype))

    def clear(self) -> None:
        """Forget all items."""
        with self._lock:
            self._slots.clear()
            self._was_used[:] = False
            self._size = self._hand = 0

    def _free(self, count: int) -> Ints:
        """`count` slots to write to; what they held is forgotten."""
        fresh = np.arange(self._size, min(self._size + count, self.capacity), dtype=np.int64)
        self._size += len(fresh)
        taken: list[Ints] = [fresh]
        left = count - len(fresh)
        while left:
            # One stretch of the clock: what was used since the hand passed last stays, once.
            stop = min(self._hand + max(left, 1024), self.capacity)
            stretch = np.arange(self._hand, stop, dtype=np.int64)
            stretch = stretch[~np.isin(stretch, taken[0])] if len(fresh) else stretch
            old = stretch[~self._was_used[stretch]][:left]
            end = int(old[-1]) + 1 if len(old) == left else stop
            self._was_used[self._hand : end] = False
            self._was_used[old] = True  # so that a second round of this call passes over them
            self._hand = end % self.capacity
            taken.append(old)
            self._slots.remove(self._key[old])
            self._key[old] = -1
            left -= len(old)
        return np.concatenate(taken)


@dataclass(frozen=True)
class ItemScorer:
    """The two halves of a compiled graph and the store between them."""

    store: ItemStore
    items: Callable[[Block], list[Tensor]]
    rest: Callable[[Block, Sequence[Tensor]], Tensor]

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        records: Sequence[PassRecord],
        collection: EmbeddingCollection,
        capacity_bytes: int,
        *,
        backend: str = AUTO,
        precision: Precision = "fp32",
    ) -> "ItemScorer":
        """Cut a compiled graph on the CPU and bind both halves; raises NoItemValuesError where nothing of an item can be kept."""
        cut = precompute_items(module)
        graph, made = (module, ()) if cut is None else (cut.rest, cut.values)
        # What the rest reads of an item as it is looked up is kept as well, which spares the lookup.
        own = [node.meta["input"] for node in graph.graph.find_nodes(op="placeholder")]
        also = [given for given in own if given.role == "item" and not given.name.startswith(PREFIX)]
        values = (*made, *also)
        longer = [given.name for given in values if any(isinstance(size, str) for size in given.dims[1:])]
        if longer or not values:
            raise NoItemValuesError(f"an item has {', '.join(longer)} of any length" if longer else "it reads nothing of an item")
        rest = lower(graph, CPU, one=graph_for_one(graph, records), backend=backend, precision=precision)
        items = None if cut is None else lower(cut.items, CPU, backend=backend, precision=precision)
        kept_as = {given.name: rest.dtypes.get(given.name, given.dtype) for given in values}
        dtypes = {name: dtype for name, dtype in (items.dtypes if items else rest.dtypes).items() if kept_as.get(name, dtype) == dtype}
        of_items, of_request = RequestLookup(collection, dtypes), RequestLookup(collection, rest.dtypes)
        item_inputs, rest_inputs = [given.name for given in items.inputs] if items else [], [given.name for given in rest.inputs]
        names = [given.name for given in values]

        def compute(block: Block) -> list[Tensor]:
            inputs = of_items.side("item", block)
            found = items(*[inputs[name] for name in item_inputs]) if items else ()
            return [*([found] if isinstance(found, Tensor) else found), *(inputs[given.name] for given in also)]

        def score(block: Block, values: Sequence[Tensor]) -> Tensor:
            inputs = of_request.side("request", block)
            inputs.update(zip(names, values, strict=True))
            inputs[USER_ROW] = torch.zeros(len(values[0]), dtype=torch.int64)
            return rest(*[inputs[name] for name in rest_inputs])

        return cls(ItemStore(values, kept_as, capacity_bytes), compute, score)

    def logits(self, request: Block, key_N: Ints, items: Callable[[Ints], Block]) -> Tensor:
        """logits_NT of one request for the items of these keys; items: the block of those at the places (M,) that are not kept."""
        values, missing_M = self.store.read(key_N)
        if len(missing_M):
            made = self.items(items(missing_M))
            self.store.keep(key_N[missing_M], made)
            places = torch.from_numpy(missing_M)
            for value, own in zip(values, made, strict=True):
                value.index_copy_(0, places, own.to(value.dtype))
        return self.rest(request, values)
