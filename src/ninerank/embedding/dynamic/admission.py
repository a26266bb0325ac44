"""Which ids get a row of their own: all, those seen often enough, or those that win a draw.

A call of `admit` sees the distinct unknown ids of one lookup with their numbers of occurrences, counts them all, and only then
decides: the answer does not depend on the order of the ids. What a policy holds adds up over processes that own disjoint ids.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from typing_extensions import Self

from ninerank.config import Config
from ninerank.embedding.dynamic.idmap import IdMap, Ints
from ninerank.embedding.dynamic.native import mix64, share, stream, stream_key
from ninerank.errors import CheckpointError
from ninerank.features.native import jit

__all__ = ["Admission", "AdmissionConfig", "Always", "BloomCounter", "ExactCounter", "Frequency", "Probability", "admission"]

Mask = npt.NDArray[np.bool_]
State = dict[str, npt.NDArray[np.generic]]

BLOCK_COUNTERS = 64
GREATEST_COUNTER = 255
S11 = np.uint64(11)


class Always(Config):
    """Every id gets a row when it is first seen in training."""

    kind: Literal["always"] = "always"


class ExactCounter(Config):
    """Counts of ids without a row in a map of their own: 21 to 43 bytes per id seen."""

    kind: Literal["exact"] = "exact"


class BloomCounter(Config):
    """Counts in a blocked counting Bloom filter, whose size is fixed: 13 bytes per expected id at a false positive rate of 1%, 5 at 10%.

    An id's count is never too low; it is too high for at most about `false_positive_rate` of the ids until `expected_ids` have been
    counted. A counter cannot forget one id, so an evicted id that is seen again may get its row back at once. Each lookup of an id
    reads one cache line (Putze, Sanders and Singler, Cache-, Hash- and Space-Efficient Bloom Filters, WEA 2007).
    """

    kind: Literal["bloom"] = "bloom"
    expected_ids: int = Field(ge=1, le=1 << 30)
    false_positive_rate: float = Field(default=0.01, ge=1e-5, le=0.5)

    @property
    def shape(self) -> tuple[int, int]:
        """(blocks, hashes) of the smallest filter that keeps the rate; a block is one cache line of 64 counters."""
        sparse, dense = 2.0**-20, float(BLOCK_COUNTERS)
        while dense - sparse > 1e-3 * sparse:
            middle = (sparse * dense) ** 0.5
            sparse, dense = (middle, dense) if _best(middle)[0] <= self.false_positive_rate else (sparse, middle)
        return math.ceil(self.expected_ids / sparse), _best(sparse)[1]


def _best(ids_per_block: float) -> tuple[float, int]:
    """Lowest false positive rate at a load of blocks, and the number of hashes that gives it."""
    return min((_false_positive_rate(ids_per_block, hashes), hashes) for hashes in (1, 2, 4, 8))


def _false_positive_rate(ids_per_block: float, hashes: int) -> float:
    """Chance that all counters of an unseen id are taken, where blocks hold Poisson-many ids that take one counter in each lane."""
    spread = 12 * math.sqrt(ids_per_block) + 12
    first, last = max(0, int(ids_per_block - spread)), int(ids_per_block + spread)
    free = 1 - hashes / BLOCK_COUNTERS
    return sum(
        math.exp(held * math.log(ids_per_block) - ids_per_block - math.lgamma(held + 1)) * (1 - free**held) ** hashes
        for held in range(first, last + 1)
    )


class Frequency(Config):
    """An id gets a row in the lookup in which its occurrences in training reach `threshold`.

    halve_every: steps after which all counts are halved (rounded down), so that rare ids are forgotten and memory stays bounded; None:
    never.
    """

    kind: Literal["frequency"] = "frequency"
    threshold: int = Field(ge=1, le=(1 << 31) - 1)
    counter: Annotated[ExactCounter | BloomCounter, Field(discriminator="kind")] = ExactCounter()
    halve_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _fits_counter(self) -> Self:
        if isinstance(self.counter, BloomCounter) and self.threshold > GREATEST_COUNTER:
            raise ValueError(
                f"threshold {self.threshold} is beyond a Bloom counter's greatest value {GREATEST_COUNTER}; use the exact counter"
            )
        return self


class Probability(Config):
    """Each occurrence of an id without a row gives it one with this probability.

    The draw is a hash of seed, table, id, step and the occurrence's number among those of the id in the lookup: it needs no memory, and
    comes out the same for any order of rows and any number of processes, as long as one lookup sees all of a step's occurrences.
    """

    kind: Literal["probability"] = "probability"
    probability: float = Field(gt=0.0, le=1.0)


AdmissionConfig = Annotated[Always | Frequency | Probability, Field(discriminator="kind")]


class Admission(Protocol):
    """State and decision of one table's policy."""

    def admit(self, ids: Ints, counts: Ints, step: int) -> Mask:
        """Which of the distinct unknown `ids`, seen `counts` times in this lookup, get a row now."""

    def finish_step(self, step: int) -> None:
        """Age the counts after a step."""

    def state(self) -> State:
        """What the policy holds, by raw id."""

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Take what `state` gave; raises CheckpointError and changes nothing if it does not fit."""

    @property
    def num_pending(self) -> int:
        """Ids that are counted one by one."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""


def admission(config: Always | Frequency | Probability, *, seed: int, table: str) -> Admission:
    """Policy of one table."""
    if isinstance(config, Probability):
        return _Draw(config.probability, stream_key("admission", seed, table))
    if isinstance(config, Always):
        return _Stateless()
    if isinstance(config.counter, ExactCounter):
        return _Exact(config.threshold, config.halve_every)
    return _Bloom(config.threshold, config.halve_every, config.counter, stream_key("admission", seed, table))


class _Stateless:
    """Base of policies without memory; by itself it admits all."""

    num_pending = 0
    num_bytes = 0

    def admit(self, ids: Ints, counts: Ints, step: int) -> Mask:
        return np.ones(len(ids), np.bool_)

    def finish_step(self, step: int) -> None:
        pass

    def state(self) -> State:
        return {}

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        _check_keys(state, ())


class _Draw(_Stateless):
    def __init__(self, probability: float, key: np.uint64) -> None:
        self._bound, self._key = math.ceil(probability * 2.0**53), key

    def admit(self, ids: Ints, counts: Ints, step: int) -> Mask:
        out = np.empty(len(ids), np.bool_)
        _draw(ids, counts, self._key, np.uint64(step), np.uint64(self._bound), out)
        return out


@jit
def _draw(ids, counts, key, step, bound, out):  # type: ignore[no-untyped-def]
    for i in range(ids.shape[0]):
        own = key ^ mix64(step)
        out[i] = False
        for occurrence in range(counts[i]):
            if stream(own, np.uint64(ids[i]), occurrence) >> S11 < bound:
                out[i] = True
                break


class _Exact:
    def __init__(self, threshold: int, halve_every: int | None) -> None:
        self._threshold, self._halve_every = threshold, halve_every
        self._counts = IdMap()

    @property
    def num_pending(self) -> int:
        return len(self._counts)

    @property
    def num_bytes(self) -> int:
        return self._counts.num_bytes

    def admit(self, ids: Ints, counts: Ints, step: int) -> Mask:
        totals = self._counts.find(ids) + counts
        admitted: Mask = totals >= self._threshold
        self._counts.put(ids[~admitted], totals[~admitted])
        self._counts.remove(ids[admitted])
        return admitted

    def finish_step(self, step: int) -> None:
        if self._halve_every is None or step % self._halve_every:
            return
        kept = IdMap()
        for ids, counts in self._counts.blocks():
            halved = counts >> 1
            kept.put(ids[halved > 0], halved[halved > 0])
        self._counts = kept

    def state(self) -> State:
        ids, counts = self._counts.items()
        return {"pending.id": ids, "pending.count": counts}

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        _check_keys(state, ("pending.id", "pending.count"))
        ids, counts = (np.ascontiguousarray(state[key], np.int64) for key in ("pending.id", "pending.count"))
        if ids.ndim != 1 or ids.shape != counts.shape or (counts < 1).any() or len(np.unique(ids)) != len(ids):
            raise CheckpointError("pending ids: one count of at least 1 is needed for each of distinct ids")
        restored = IdMap(len(ids))
        restored.put(ids, counts)
        self._counts = restored


class _Bloom:
    """Counters in blocks of one cache line, a block split into one lane per hash, so that an id never hits a counter twice."""

    num_pending = 0

    def __init__(self, threshold: int, halve_every: int | None, config: BloomCounter, key: np.uint64) -> None:
        self._threshold, self._halve_every = threshold, halve_every
        num_blocks, self._num_hashes = config.shape
        self._key = key
        self._counters = np.zeros((num_blocks, BLOCK_COUNTERS), np.uint8)

    @property
    def num_bytes(self) -> int:
        return self._counters.nbytes

    def admit(self, ids: Ints, counts: Ints, step: int) -> Mask:
        estimates = np.empty(len(ids), np.int64)
        _count(self._counters, self._key, self._num_hashes, ids, counts, estimates)
        return estimates >= self._threshold

    def finish_step(self, step: int) -> None:
        if self._halve_every is not None and step % self._halve_every == 0:
            np.right_shift(self._counters, 1, out=self._counters)

    def state(self) -> State:
        return {"pending.counters": self._counters.reshape(-1).copy()}

    def load_state(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        _check_keys(state, ("pending.counters",))
        counters = state["pending.counters"]
        if counters.dtype != np.uint8 or counters.shape != (self._counters.size,):
            raise CheckpointError(
                f"pending.counters: {counters.dtype} {counters.shape} in the state, uint8 ({self._counters.size},) is needed: "
                "expected_ids and false_positive_rate must be those of the checkpoint"
            )
        self._counters[:] = counters.reshape(self._counters.shape)


@jit
def _count(counters, key, num_hashes, ids, counts, estimates):  # type: ignore[no-untyped-def]
    """Add all counts, then estimate each: what an id is told does not depend on its place among the others."""
    lane_counters, num_blocks = np.uint64(BLOCK_COUNTERS // num_hashes), counters.shape[0]
    for i in range(ids.shape[0]):
        word = np.uint64(ids[i])
        block, lanes = share(stream(key, word, 0), num_blocks), stream(key, word, 1)
        for j in range(num_hashes):
            place = np.int64(np.uint64(j) * lane_counters + lanes % lane_counters)
            counters[block, place] = min(np.int64(counters[block, place]) + counts[i], GREATEST_COUNTER)
            lanes //= lane_counters
    for i in range(ids.shape[0]):
        word = np.uint64(ids[i])
        block, lanes = share(stream(key, word, 0), num_blocks), stream(key, word, 1)
        least = np.int64(GREATEST_COUNTER)
        for j in range(num_hashes):
            place = np.int64(np.uint64(j) * lane_counters + lanes % lane_counters)
            least = min(least, np.int64(counters[block, place]))
            lanes //= lane_counters
        estimates[i] = least


def _check_keys(state: Mapping[str, object], wanted: tuple[str, ...]) -> None:
    given = {key for key in state if key.startswith("pending.")}
    if given != set(wanted):
        raise CheckpointError(f"admission state holds {sorted(given)}, this table's policy needs {sorted(wanted)}")
