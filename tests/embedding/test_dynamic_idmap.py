"""The id map against a plain dict: any ids, any order of operations, growth, removal, hostile keys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ninerank.embedding.dynamic.idmap import MAX_LOAD, IdMap
from ninerank.embedding.dynamic.native import mix64

SMALLEST, GREATEST = -(2**63), 2**63 - 1
SPECIAL = [0, -1, 1, SMALLEST, GREATEST, -2, 2**62, -(2**62)]


def ints(values: object) -> np.ndarray:
    return np.array(values, np.int64).reshape(-1)


ids_of_any_kind = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(-30, 30),
    st.integers(0, 40).map(lambda n: (n << 48) + 5),  # equal low bits
    st.integers(0, 40).map(lambda n: SMALLEST + n),  # equal high bits
    st.integers(SMALLEST, GREATEST),
)


class IdMapMachine(RuleBasedStateMachine):
    """Every operation on the map and on a dict, with a comparison of all content after each."""

    def __init__(self) -> None:
        super().__init__()
        self.map = IdMap(key=7)
        self.model: dict[int, int] = {}

    @rule(ids=st.lists(ids_of_any_kind, max_size=40), start=st.integers(1, 1000))
    def put(self, ids: list[int], start: int) -> None:
        values = list(range(start, start + len(ids)))
        self.map.put(ints(ids), ints(values))
        self.model.update(zip(ids, values, strict=True))

    @rule(ids=st.lists(ids_of_any_kind, max_size=40))
    def remove(self, ids: list[int]) -> None:
        assert self.map.remove(ints(ids)).tolist() == [self.model.pop(word, 0) for word in ids]

    @rule(ids=st.lists(ids_of_any_kind, max_size=20))
    def find(self, ids: list[int]) -> None:
        assert self.map.find(ints(ids)).tolist() == [self.model.get(word, 0) for word in ids]

    @precondition(lambda self: self.model)
    @rule()
    def remove_all(self) -> None:
        self.map.remove(ints(list(self.model)))
        self.model.clear()
        assert not self.map.slots[:, 1].any()

    @rule()
    def grow(self) -> None:
        if self.map.num_slots < 4096:
            self.map.grow()

    @invariant()
    def same_content(self) -> None:
        ids, values = self.map.items()
        assert dict(zip(ids.tolist(), values.tolist(), strict=True)) == self.model
        assert ids.tolist() == sorted(self.model)
        assert len(self.map) == len(self.model)
        assert self.map.load_factor <= MAX_LOAD


TestIdMapMachine = IdMapMachine.TestCase
TestIdMapMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("special", SPECIAL)
def test_every_id_is_valid(special: int) -> None:
    ids = IdMap()
    assert ids.find(ints([special])).tolist() == [0]
    ids.put(ints([special]), ints([-5]))
    assert ids.find(ints([special, special ^ 1])).tolist() == [-5, 0]
    assert ids.remove(ints([special])).tolist() == [-5]
    assert len(ids) == 0


@pytest.mark.parametrize("size", [1, 11, 12, 13, 23, 24, 25, 95, 96, 97, 3 * 2**12 - 1, 3 * 2**12, 3 * 2**12 + 1])
def test_growth_boundaries(size: int) -> None:
    ids, words = IdMap(), np.arange(size) * 2_654_435_761 - 17
    ids.put(words, np.arange(1, size + 1))
    assert ids.num_slots == max(16, 1 << int(np.ceil(np.log2(size / MAX_LOAD))))
    assert ids.find(words).tolist() == list(range(1, size + 1))
    assert not ids.find(words + 1).any()


def test_a_large_batch_grows_by_what_it_brings() -> None:
    """The share of new ids so far says how much room the rest will take: few rehashes, and none for ids that are known."""
    ids, words = IdMap(), np.arange(100_000)
    ids.put(words, words + 1)
    assert ids.num_slots == 1 << 18
    known = IdMap()
    known.put(words[:6000], words[:6000] + 1)
    known.put(np.concatenate([np.repeat(words[:6000], 20), [200_000, 200_001]]), np.arange(1, 120_003))
    assert known.num_slots == 1 << 13
    mixed = IdMap(6000)
    mixed.put(np.where(np.arange(200_000) % 10 == 0, np.arange(200_000), 1), np.arange(1, 200_001))
    assert mixed.num_slots == 1 << 15
    assert (len(mixed), len(known)) == (20_001, 6002)


@pytest.mark.parametrize("expected", [1, 12, 13, 24, 25, 1000])
def test_no_growth_up_to_the_expected_size(expected: int) -> None:
    ids = IdMap(expected)
    slots = ids.num_slots
    ids.put(np.arange(expected), np.arange(1, expected + 1))
    assert ids.num_slots == slots


def test_one_batch_may_bring_the_same_id_many_times() -> None:
    ids = IdMap()
    ids.put(ints([4] * 100 + [5]), np.arange(1, 102))
    assert (len(ids), ids.num_slots, ids.find(ints([4, 5])).tolist()) == (2, 16, [100, 101])


def test_value_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="value 0 of id 9"):
        IdMap().put(ints([8, 9]), ints([1, 0]))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(np.arange(100_000) << 40, id="equal low bits"),
        pytest.param(np.arange(100_000) + SMALLEST, id="equal high bits"),
        pytest.param(np.arange(100_000) * 2**32, id="steps of a power of two"),
        pytest.param(np.arange(100_000) * -(2**20) - 1, id="negative"),
    ],
)
def test_alike_ids_spread(words: np.ndarray) -> None:
    ids = IdMap(key=0)
    ids.put(words, np.arange(1, len(words) + 1))
    assert (ids.find(words) == np.arange(1, len(words) + 1)).all()
    assert ids.longest_probe() < 120  # random keys: the longest run at this load is a few dozen slots


def test_ids_made_to_collide_need_the_key() -> None:
    """Ids whose home is slot 0 under key 0 pile up there, and spread under the random key a map has otherwise."""
    words = ints([word for word in range(400_000) if int(mix64(np.uint64(word))) >> 54 == 0])
    known, drawn = IdMap(key=0), IdMap()
    for ids in (known, drawn):
        ids.put(words, np.arange(1, len(words) + 1))
        assert (ids.find(words) == np.arange(1, len(words) + 1)).all()
    assert known.longest_probe() > 200
    assert drawn.longest_probe() < 60


def test_removal_leaves_no_trace() -> None:
    """After any number of insertions and removals a probe is no longer than in a map that was filled once."""
    rng = np.random.default_rng(0)
    ids, alive = IdMap(key=3), rng.integers(SMALLEST, GREATEST, 700)
    ids.put(alive, np.arange(1, 701))
    for _ in range(300):
        ids.remove(alive)
        alive = rng.integers(SMALLEST, GREATEST, 700)
        ids.put(alive, np.arange(1, 701))
    fresh = IdMap(key=3)
    fresh.put(alive, np.arange(1, 701))
    assert ids.num_slots == fresh.num_slots == 1024
    assert ids.longest_probe() == fresh.longest_probe()
    ids.remove(alive[::2])
    fresh.remove(alive[::2])
    assert (ids.find(alive) == fresh.find(alive)).all()


@given(st.lists(st.integers(SMALLEST, GREATEST), unique=True, min_size=1, max_size=400), st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_blocks_give_everything_once(words: list[int], block: int) -> None:
    ids = IdMap()
    ids.put(ints(words), np.arange(1, len(words) + 1))
    pairs = [pair for part in ids.blocks(block) for pair in zip(*(values.tolist() for values in part), strict=True)]
    assert sorted(pairs) == sorted(zip(words, range(1, len(words) + 1), strict=True))


def test_clear() -> None:
    ids = IdMap(1000)
    ids.put(np.arange(1000), np.arange(1, 1001))
    ids.clear()
    assert (len(ids), ids.num_slots, ids.num_bytes) == (0, 16, 256)
    assert not ids.find(np.arange(1000)).any()


def test_mix64_known_answers() -> None:
    """SplitMix64 from state 0 gives these words (Vigna's published generator)."""
    golden = 0x9E3779B97F4A7C15
    words = [int(mix64(np.uint64(golden * n % 2**64))) for n in (1, 2, 3)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
