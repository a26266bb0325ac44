"""Lists: against the Open Bandit Pipeline's figures, and known values of list policies under the belief of each estimator."""

import itertools
import math

import numpy as np
import pytest

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy.slates import SLATE_ESTIMATORS, Slates, pseudo_inverse_weights, slate_value
from ninerank.metrics import ratio_interval

# What the Open Bandit Pipeline (obp 0.4.1) gives on the arrays below; its reward-interaction estimator is `cascade` here.
OPEN_BANDIT_PIPELINE = {"standard": 5.67617418744054, "item_position": 1.8791241833475827, "cascade": 3.6602476025621944}


def test_estimates_are_those_of_the_open_bandit_pipeline() -> None:
    rng = np.random.default_rng(21)
    logging, target = rng.uniform(0.1, 0.9, (30, 3)), rng.uniform(0.1, 0.9, (30, 3))
    reward = rng.random((30, 3)) < 0.4
    rows = Slates.of(reward, logging, target)
    assert {name: slate_value(rows, name).value for name in OPEN_BANDIT_PIPELINE} == pytest.approx(OPEN_BANDIT_PIPELINE, abs=1e-9)
    weight = target / logging
    assert slate_value(rows, "pseudo_inverse").value == pytest.approx((reward.sum(1) * (weight.sum(1) - 2)).mean(), abs=1e-12)
    joint = weight.cumprod(1)
    assert slate_value(rows, "reward_interaction").value == pytest.approx(((reward * joint).sum(0) / joint.sum(0)).sum(), abs=1e-12)
    assert slate_value(rows, "reward_interaction", lookback=1).value == pytest.approx(((reward * weight).sum(0) / weight.sum(0)).sum())


PLACES, ITEMS = 3, 4
GOOD = np.array([0.5, 0.35, 0.2, 0.1])
LOOK = np.array([1.0, 0.7, 0.5])
LISTS = np.array(list(itertools.permutations(range(ITEMS), PLACES)))


def plackett_luce(liking: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Chance of each item at its place given those above it, drawn without repetition: (L, K)."""
    chances = np.empty(lists.shape)
    left = np.tile(liking, (len(lists), 1))
    row = np.arange(len(lists))
    for k in range(lists.shape[1]):
        chances[:, k] = left[row, lists[:, k]] / left.sum(1)
        left[row, lists[:, k]] = 0
    return chances


def marginals(chance_M: np.ndarray) -> np.ndarray:
    """Chance of each item at each place, (K, I)."""
    found = np.zeros((PLACES, ITEMS))
    for k in range(PLACES):
        np.add.at(found[k], LISTS[:, k], chance_M)
    return found


def clicks(rng: np.random.Generator, lists: np.ndarray, belief: str) -> np.ndarray:
    """Clicks whose chance at k depends on the item at k alone, or on those above it too."""
    return rng.random(lists.shape) < click_chances(lists, belief)


def click_chances(lists: np.ndarray, belief: str) -> np.ndarray:
    good = GOOD[lists]
    if belief == "cascade":  # a good item above makes the next one less likely to be reached
        reached = np.cumprod(np.concatenate([np.ones((len(lists), 1)), 1 - 0.8 * good[:, :-1]], axis=1), axis=1)
        return good * reached
    return good * LOOK


def true_value(chance_M: np.ndarray, belief: str) -> float:
    return float(chance_M @ click_chances(LISTS, belief).sum(1))


LOGGING, TARGET = np.array([1.0, 1.2, 1.4, 1.6]), np.array([2.0, 1.3, 1.0, 0.8])
RUNS = 200


@pytest.mark.parametrize(
    ("estimator", "belief"),
    [
        ("item_position", "place"),
        ("pseudo_inverse", "place"),
        ("cascade", "place"),
        ("cascade", "cascade"),
        ("reward_interaction", "cascade"),
        ("standard", "cascade"),
    ],
)
def test_intervals_cover_the_known_value_of_lists(estimator: str, belief: str) -> None:
    chance_logging, chance_target = plackett_luce(LOGGING, LISTS).prod(1), plackett_luce(TARGET, LISTS).prod(1)
    truth, hits = true_value(chance_target, belief), 0
    at_logging, at_target = marginals(chance_logging), marginals(chance_target)
    place = np.arange(PLACES)
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        shown = LISTS[rng.choice(len(LISTS), 1500, p=chance_logging)]
        reward = clicks(rng, shown, belief)
        if estimator == "pseudo_inverse":
            weight = pseudo_inverse_weights(shown, LISTS, chance_logging, at_target)
            hits += ratio_interval(reward.sum(1) * weight).covers(truth)
            continue
        if estimator == "item_position":
            rows = Slates.of(reward, at_logging[place, shown], at_target[place, shown])
        else:
            rows = Slates.of(reward, plackett_luce(LOGGING, shown), plackett_luce(TARGET, shown))
        hits += slate_value(rows, estimator).covers(truth)
    assert 0.90 <= hits / RUNS <= 0.99


@pytest.mark.parametrize("estimator", ["independent", "pseudo_inverse"])
def test_intervals_cover_where_places_are_drawn_one_by_one(estimator: str) -> None:
    """With repetition allowed, chances given those above are those of the place: both beliefs hold for rewards by item and place."""
    logging, target = LOGGING / LOGGING.sum(), TARGET / TARGET.sum()
    truth, hits = float((target @ GOOD) * LOOK.sum()), 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        shown = rng.choice(ITEMS, (1500, PLACES), p=logging)
        reward = rng.random(shown.shape) < GOOD[shown] * LOOK
        hits += slate_value(Slates.of(reward, logging[shown], target[shown]), estimator).covers(truth)
    assert 0.90 <= hits / RUNS <= 0.99


def test_estimators_by_place_are_biased_where_users_read_from_the_top() -> None:
    chance_logging, chance_target = plackett_luce(LOGGING, LISTS).prod(1), plackett_luce(TARGET**3, LISTS).prod(1)
    rng = np.random.default_rng(1)
    shown = LISTS[rng.choice(len(LISTS), 200_000, p=chance_logging)]
    reward, place = clicks(rng, shown, "cascade"), np.arange(PLACES)
    by_place = Slates.of(reward, marginals(chance_logging)[place, shown], marginals(chance_target)[place, shown])
    truth = true_value(chance_target, "cascade")
    assert not slate_value(by_place, "item_position").covers(truth)
    assert slate_value(Slates.of(reward, plackett_luce(LOGGING, shown), plackett_luce(TARGET**3, shown)), "cascade").covers(truth)


def test_pseudo_inverse_of_independent_places_is_the_closed_form() -> None:
    rng = np.random.default_rng(2)
    possible = np.array(list(itertools.product(range(3), repeat=2)))
    by_place = rng.dirichlet(np.ones(3), 2)
    target = rng.dirichlet(np.ones(3), 2)
    chance = by_place[0, possible[:, 0]] * by_place[1, possible[:, 1]]
    weight = pseudo_inverse_weights(possible, possible, chance, target)
    ratio = target / by_place
    np.testing.assert_allclose(weight, ratio[0, possible[:, 0]] + ratio[1, possible[:, 1]] - 1, atol=1e-9)


def test_short_lists_and_rows_of_places() -> None:
    nan = math.nan
    table = Slates.of([[1, 0], [1, nan]], [[0.5, 0.5], [0.25, nan]], [[0.5, 0.25], [0.5, nan]])
    rows = Slates.of_rows([9, 4, 4], [0, 1, 0], [1, 0, 1], [0.25, 0.5, 0.5], [0.5, 0.25, 0.5])
    for name in SLATE_ESTIMATORS:
        assert slate_value(rows, name).value == pytest.approx(slate_value(table, name).value)
    assert slate_value(table, "item_position").value == pytest.approx((1 + 2) / 2)
    # Place 0 of both lists: (1 * 1 + 1 * 2) / (1 + 2); place 1 of one list in two: 0.
    assert slate_value(table, "reward_interaction").value == pytest.approx(1.0)


def test_wrong_lists_are_refused() -> None:
    with pytest.raises(DataError, match="no propensities.*log with each"):
        Slates.of([[1]], None, [[0.5]])
    with pytest.raises(DataError, match="no propensities"):
        Slates.of_rows([1], [0], [1], None, [0.5])
    with pytest.raises(DataError, match="propensity 0.0 in list 0, place 1"):
        Slates.of([[1, 0]], [[0.5, 0.0]], [[0.5, 0.5]])
    with pytest.raises(DataError, match="target probability 2.0 in list 0, place 0"):
        Slates.of([[1]], [[0.5]], [[2.0]])
    with pytest.raises(DataError, match="must be nan"):
        Slates.of([[1, math.nan]], [[0.5, 0.5]], [[0.5, 0.5]])
    with pytest.raises(DataError, match="occurs twice"):
        Slates.of_rows([1, 1], [0, 0], [1, 1], [0.5, 0.5], [0.5, 0.5])
    with pytest.raises(DataError, match="place 99999999: at most 10000"):
        Slates.of_rows([1], [99_999_999], [1], [0.5], [0.5])
    with pytest.raises(ValueError, match="no slate estimator 'rips'"):
        slate_value(Slates.of([[1]], [[0.5]], [[0.5]]), "rips")
    with pytest.raises(ValueError, match="lookback 2 with cascade"):
        slate_value(Slates.of([[1]], [[0.5]], [[0.5]]), "cascade", lookback=2)
    with pytest.raises(DataError, match="puts item 1 at place 0, where the logging policy never does"):
        pseudo_inverse_weights([[0]], [[0]], [1.0], [[0.5, 0.5]])
