"""Position bias: found again from simulated clicks, by random traffic, by swaps and by regression EM."""

import numpy as np
import pytest

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy.position import bias_from_random_traffic, bias_from_swaps, regression_em

LOOK = np.array([0.9, 0.6, 0.4, 0.25])
THETA = LOOK / LOOK[0]


def shown(seed: int, requests: int, *, lean: float) -> tuple[np.ndarray, ...]:
    """Clicks, places, items, features and request of lists of 4 of 40 items; `lean` ranks the relevant ones higher, 0 is random traffic."""
    rng = np.random.default_rng(seed)
    feature = rng.normal(size=(40, 2))
    relevance = 1 / (1 + np.exp(1 - feature @ [1.0, -0.7]))
    key = lean * relevance + rng.gumbel(size=(requests, 40))
    item = np.argsort(-key, axis=1)[:, :4].ravel()
    place, request = np.tile(np.arange(4), requests), np.repeat(np.arange(requests), 4)
    click = rng.random(len(item)) < LOOK[place] * relevance[item]
    return click, place, item, feature[item], request


def test_random_traffic_tells_the_bias() -> None:
    hits = np.zeros(4)
    for seed in range(100):
        click, place, _, _, request = shown(seed, 500, lean=0)
        found = bias_from_random_traffic(click, place, cluster_N=request)
        assert found[0][:2] == (1.0, 1.0)
        hits += [interval.covers(truth) for interval, truth in zip(found, THETA, strict=True)]
    assert (hits[1:] >= 88).all(), hits


def test_swaps_cancel_the_relevance_of_what_stands_where() -> None:
    rng = np.random.default_rng(1)
    requests = 30_000
    partner = rng.integers(1, 4, requests)
    relevance = np.array([0.8, 0.4, 0.3, 0.2])  # by the place that the ranking gives
    order = np.tile(np.arange(4), (requests, 1))
    swap = rng.random(requests) < 0.5
    row = np.arange(requests)[swap]
    order[row, 0], order[row, partner[swap]] = partner[swap], 0
    click = rng.random(order.shape) < LOOK * relevance[order]
    place, swapped = np.tile(np.arange(4), requests), np.repeat(partner, 4)
    found = bias_from_swaps(click.ravel(), place, swapped, cluster_N=np.repeat(np.arange(requests), 4))
    assert sorted(found) == [1, 2, 3]
    for k, interval in found.items():
        assert interval.value == pytest.approx(THETA[k], abs=0.04)
        assert interval.low < THETA[k] < interval.high
    naive = bias_from_random_traffic(click.ravel(), place)
    assert abs(naive[2].value - THETA[2]) > 0.05


@pytest.mark.parametrize("by", ["item", "features"])
def test_regression_em_tells_the_bias_of_a_ranked_log(by: str) -> None:
    click, place, item, feature, _ = shown(3, 20_000, lean=3)
    told = {"item_N": item} if by == "item" else {"features_ND": feature, "ridge": 1e-3}
    found = regression_em(click, place, **told)
    np.testing.assert_allclose(found.theta_K, THETA, atol=0.06)
    naive = np.array([click[place == k].mean() for k in range(4)]) / click[place == 0].mean()
    assert np.abs(found.theta_K - THETA).max() < 0.7 * np.abs(naive - THETA).max()
    assert found.relevance_N.shape == click.shape
    predicted = np.array([(found.theta_K[k] * found.relevance_N[place == k]).mean() for k in range(4)])
    np.testing.assert_allclose(predicted, [click[place == k].mean() for k in range(4)], atol=0.01)


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(DataError, match="places are float64"):
        bias_from_random_traffic([1], [0.5])
    with pytest.raises(DataError, match="place 0 has no clicks"):
        bias_from_random_traffic([0, 1], [0, 1])
    with pytest.raises(DataError, match="features_ND or item_N"):
        regression_em([1, 0], [0, 1])
    with pytest.raises(DataError, match="each item occurs once"):
        regression_em([1, 0], [0, 1], item_N=[1, 2])
    with pytest.raises(DataError, match=r"features have shape \(1, 1\)"):
        regression_em([1, 0], [0, 1], features_ND=[[1.0]])
    with pytest.raises(DataError, match="swapped has shape"):
        bias_from_swaps([1, 0], [0, 1], [1])
    with pytest.raises(DataError, match="no row at place 3"):
        bias_from_swaps([1, 0], [0, 1], [3, -1])
