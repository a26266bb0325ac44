"""Admission against counts kept in a plain dict; what the Bloom filter promises; draws that depend on no order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.embedding.dynamic.admission import Admission, AdmissionConfig, Always, BloomCounter, Frequency, Probability, admission
from ninerank.errors import CheckpointError, SpecError

Batches = list[list[int]]
batches = st.lists(st.lists(st.integers(-8, 8), max_size=20), max_size=20)


def make(config: AdmissionConfig, seed: int = 1, table: str = "item") -> Admission:
    return admission(config, seed=seed, table=table)


def admit(policy: Admission, ids: list[int], step: int = 0) -> set[int]:
    """Ids that get a row out of one lookup's occurrences."""
    counts = Counter(ids)
    words = np.array(list(counts), np.int64)
    mask = policy.admit(words, np.array(list(counts.values()), np.int64), step)
    return set(words[mask].tolist())


@given(batches, st.integers(1, 6))
@settings(max_examples=40)
def test_exact_counts(steps: Batches, threshold: int) -> None:
    policy, seen, known = make(Frequency(threshold=threshold)), Counter[int](), set[int]()
    for step, ids in enumerate(steps):
        unknown = [word for word in ids if word not in known]
        seen.update(unknown)
        admitted = admit(policy, unknown, step)
        assert admitted == {word for word in unknown if seen[word] >= threshold}
        known |= admitted
        assert policy.num_pending == len(seen.keys() - known)


@given(batches, st.integers(1, 6))
@settings(max_examples=30)
def test_bloom_counts_are_never_too_low_and_exact_while_few(steps: Batches, threshold: int) -> None:
    policy = make(Frequency(threshold=threshold, counter=BloomCounter(expected_ids=1000, false_positive_rate=1e-5)))
    seen = Counter[int]()
    for step, ids in enumerate(steps):
        seen.update(ids)
        assert admit(policy, ids, step) == {word for word in ids if seen[word] >= threshold}


@pytest.mark.parametrize("rate", [0.3, 0.1, 0.01, 0.001])
def test_bloom_false_positives_stay_near_the_rate(rate: float) -> None:
    """Ids that were seen once and not before, in a filter that holds as many as it was made for."""
    count = 50_000
    policy = make(Frequency(threshold=2, counter=BloomCounter(expected_ids=count, false_positive_rate=rate)))
    ids = np.random.default_rng(0).permutation(np.arange(2 * count) << 20)
    ones = np.ones(count, np.int64)
    first, second = ids[:count], ids[count : count + count // 50]
    policy.admit(first, ones, 0)
    wrong = policy.admit(second, ones[: len(second)], 1).mean()
    assert wrong < rate + 5 * np.sqrt(rate / len(second))
    assert policy.admit(first[:1000], ones[:1000], 2).all()


def test_bloom_memory_is_as_stated() -> None:
    policy = make(Frequency(threshold=2, counter=BloomCounter(expected_ids=1_000_000)))
    assert 12.8e6 < policy.num_bytes < 13e6
    assert policy.num_pending == 0


def test_bloom_counters_saturate() -> None:
    policy = make(Frequency(threshold=255, counter=BloomCounter(expected_ids=100)))
    assert not policy.admit(np.array([1]), np.array([254]), 0).any()
    assert policy.admit(np.array([1]), np.array([10**12]), 0).all()
    assert policy.admit(np.array([1]), np.array([1]), 0).all()


@pytest.mark.parametrize("counter", [{"kind": "exact"}, {"kind": "bloom", "expected_ids": 1000}])
def test_halving_forgets_the_rare(counter: dict[str, object]) -> None:
    policy = make(Frequency.parse({"threshold": 4, "counter": counter, "halve_every": 10}, "test"))
    assert admit(policy, [1, 1, 1, 2], 9) == set()
    policy.finish_step(9)
    policy.finish_step(10)  # 1: 3 -> 1, 2: 1 -> 0
    assert admit(policy, [1, 1, 2, 2, 2], 11) == set()
    assert admit(policy, [1, 2], 12) == {1, 2}


def test_halving_drops_ids_with_nothing_left() -> None:
    policy = make(Frequency(threshold=9, halve_every=1))
    admit(policy, [1, 2, 2, 3, 3, 3, 3])
    for step, left in enumerate([2, 1, 0]):
        policy.finish_step(step)
        assert policy.num_pending == left


@settings(max_examples=30)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=60), st.randoms(use_true_random=False), st.integers(0, 5))
def test_draws_do_not_depend_on_order_or_company(ids: list[int], random: object, step: int) -> None:
    policy = make(Probability(probability=0.3))
    shuffled = ids.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    together = admit(policy, ids, step)
    assert admit(policy, shuffled, step) == together
    assert {word for word in set(ids) if admit(policy, [word] * ids.count(word), step)} == together


@pytest.mark.parametrize("probability", [0.01, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("times", [1, 3])
def test_draws_have_their_probability(probability: float, times: int) -> None:
    policy, count = make(Probability(probability=probability)), 40_000
    share = policy.admit(np.arange(count), np.full(count, times), 5).mean()
    wanted = 1 - (1 - probability) ** times
    assert abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / count)


def test_draws_differ_by_step_seed_and_table() -> None:
    ids, ones, config = np.arange(2000), np.ones(2000, np.int64), Probability(probability=0.5)
    masks = [
        make(config).admit(ids, ones, 0),
        make(config).admit(ids, ones, 1),
        make(config, seed=2).admit(ids, ones, 0),
        make(config, table="user").admit(ids, ones, 0),
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 850 < (one == other).sum() < 1150


def test_more_occurrences_never_hurt() -> None:
    policy, ids = make(Probability(probability=0.1)), np.arange(5000)
    few, many = (policy.admit(ids, np.full(5000, n), 3) for n in (2, 5))
    assert (many >= few).all()
    assert many.sum() > few.sum()


@pytest.mark.parametrize(
    "config",
    [Always(), Frequency(threshold=3), Frequency(threshold=3, counter=BloomCounter(expected_ids=64)), Probability(probability=0.5)],
)
def test_state_goes_on_where_it_stopped(config: AdmissionConfig) -> None:
    rng = np.random.default_rng(0)
    steps = rng.integers(-10, 10, (20, 8)).tolist()
    whole, first = make(config), make(config)
    for step in range(10):
        admit(whole, steps[step], step)
        admit(first, steps[step], step)
    second = make(config)
    second.load_state(first.state())
    for step in range(10, 20):
        assert admit(second, steps[step], step) == admit(whole, steps[step], step)


@pytest.mark.parametrize(
    ("config", "state", "message"),
    [
        (Always(), {"pending.id": np.zeros(1, np.int64)}, "policy needs"),
        (Frequency(threshold=2), {}, "policy needs"),
        (Frequency(threshold=2), {"pending.id": np.array([1, 1]), "pending.count": np.array([1, 1])}, "distinct"),
        (Frequency(threshold=2), {"pending.id": np.array([1, 2]), "pending.count": np.array([1, 0])}, "at least 1"),
        (Frequency(threshold=2), {"pending.id": np.array([1, 2]), "pending.count": np.array([1])}, "one count"),
        (Frequency(threshold=2, counter=BloomCounter(expected_ids=64)), {"pending.counters": np.zeros(640, np.uint8)}, "expected_ids"),
        (Frequency(threshold=2, counter=BloomCounter(expected_ids=64)), {"pending.counters": np.zeros(320, np.int8)}, "uint8"),
    ],
)
def test_state_of_another_policy_is_refused(config: AdmissionConfig, state: dict[str, np.ndarray], message: str) -> None:
    policy = make(config)
    with pytest.raises(CheckpointError, match=message):
        policy.load_state(state)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"threshold": 0}, "threshold"),
        ({"threshold": 256, "counter": {"kind": "bloom", "expected_ids": 10}}, "beyond a Bloom counter"),
        ({"threshold": 2, "counter": {"kind": "blom", "expected_ids": 10}}, "counter"),
        ({"threshold": 2, "halve_every": 0}, "halve_every"),
    ],
)
def test_configuration_is_checked(data: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Frequency.parse(data, "admission")
