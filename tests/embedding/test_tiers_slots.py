"""Which rows give up their slot: the least used ones, ties by smaller row, never one in use."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.embedding.tiers.slots import QUEUE_SHARE, Slots


def step(slots: Slots, ids: list[int], *, train: bool = True) -> list[int]:
    """One batch from beginning to end; returns the rows that were evicted, in the order in which they were chosen."""
    found = slots.find(np.array(ids, np.int64))
    missing = found.missing_M
    assert len(missing) <= slots.num_available(found)
    victims = slots.victims(len(missing) - (slots.num_slots - slots.used))
    evicted = slots.row[victims].tolist()
    fresh = slots.assign(missing, victims)
    found.slot_N[found.position_A] = fresh[found.row_A]
    assert slots.row[found.slot_N].tolist() == ids
    if train:
        slots.count(np.concatenate([found.present_P, fresh]))
        slots.age()
    return evicted


@settings(deadline=None, max_examples=50)
@given(
    num_slots=st.integers(1, QUEUE_SHARE - 1),
    decay=st.sampled_from([1.0, 0.9, 0.3]),
    seed=st.integers(0, 1000),
    num_steps=st.integers(1, 60),
)
def test_the_least_used_go_first(num_slots: int, decay: float, seed: int, num_steps: int) -> None:
    """Against counts that are kept one by one, sorted anew for each batch."""
    rng = np.random.default_rng(seed)
    slots, cached = Slots(num_slots, decay), dict[int, float]()
    for number in range(num_steps):
        ids = rng.choice(4 * num_slots, rng.integers(1, num_slots + 1), replace=False).tolist()
        missing = [row for row in ids if row not in cached]
        least = sorted((count, row) for row, count in cached.items() if row not in ids)
        expected = [row for _, row in least[: max(0, len(missing) - (num_slots - len(cached)))]]
        assert step(slots, ids) == expected
        for row in expected:
            del cached[row]
        # As the cache counts, seen from step 0: 1 / decay^number for this step, rounded in the same way.
        weight = 1.0
        for _ in range(number):
            weight /= decay
        for row in ids:
            cached[row] = cached.get(row, 0.0) + weight


def test_frequencies_survive_any_number_of_steps() -> None:
    slots = Slots(3, 0.5)
    for _ in range(3000):
        step(slots, [1, 2])
        step(slots, [2])
    assert np.isfinite(slots._frequency).all()
    step(slots, [3])
    # Weights 1/4 + 1/16 + ... = 1/3 for row 1, 1/2 + 1/4 + ... just below 1 for row 2, 1 for row 3.
    assert step(slots, [4, 5]) == [1, 2]


def test_reading_does_not_count() -> None:
    slots = Slots(2, 1.0)
    step(slots, [1])
    for _ in range(5):
        step(slots, [9], train=False)
    assert step(slots, [2]) == [9]
    assert step(slots, [3]) == [1]


@pytest.mark.parametrize("seed", range(3))
def test_large_caches_queue_their_victims(seed: int) -> None:
    """Victims are cached rows outside the batch, rows that come often stay, and equal runs evict alike."""
    rng, num_slots = np.random.default_rng(seed), 20 * QUEUE_SHARE
    one, two = Slots(num_slots, 0.99), Slots(num_slots, 0.99)
    popular = rng.permutation(10 * num_slots)
    hits = evictions = 0
    for _ in range(200):
        ids = np.unique(popular[np.minimum(rng.zipf(1.2, 150) - 1, len(popular) - 1)]).tolist()
        before = set(one.row[: one.used].tolist())
        evicted = step(one, ids)
        assert evicted == step(two, ids)
        assert set(evicted) <= before - set(ids)
        assert len(set(one.row[: one.used].tolist())) == one.used
        hits += len(before & set(ids))
        evictions += len(evicted)
    assert evictions > num_slots / 2
    assert hits > 200 * 30


def test_pinned_slots_stay() -> None:
    slots = Slots(4, 1.0)
    for row in (1, 2, 3, 4):
        step(slots, [row])
    held = slots.find(np.array([1, 2])).present_P
    slots.pin(held)
    slots.pin(held[:1])
    assert slots.num_available(slots.find(np.array([2, 7, 8]))) == 2
    assert step(slots, [7, 8]) == [3, 4]
    slots.unpin(held)
    assert slots.num_pinned == 1
    assert step(slots, [5]) == [2]
    slots.unpin(held[:1])
    assert slots.num_pinned == 0


def test_absent_changes_nothing() -> None:
    slots = Slots(3, 1.0)
    step(slots, [5, 6])
    assert slots.absent(np.array([9, 5, 7, 9])).tolist() == [7, 9]
    assert slots.absent(np.empty(0, np.int64)).tolist() == []
    assert slots.num_bytes > 3 * 28
    slots.clear()
    assert slots.absent(np.array([5, 6])).tolist() == [5, 6]
