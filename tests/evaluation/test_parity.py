"""Score parity by hand, and merged over shards."""

import json
import math

import numpy as np
import pytest

from ninerank.evaluation.parity import Parity


def column(*scores: float) -> np.ndarray:
    return np.array(scores, np.float32)[:, None]


def test_differences_and_flips_by_hand() -> None:
    parity = Parity()
    parity.update("same", column(0.3, 0.2, 0.1), column(0.3, 0.2, 0.1))
    parity.update("moved", column(0.3, 0.2, 0.1), column(0.3, 0.2, 0.25))
    parity.update("top", column(0.5, 0.25), column(0.5, 0.75))
    assert (parity.num_requests, parity.num_candidates, parity.num_scores) == (3, 8, 8)
    assert (parity.num_flipped, parity.num_reordered, parity.num_top_changed) == (4, 2, 1)
    assert parity.largest == 0.5
    assert parity.worst is not None
    assert (parity.worst.request_id, parity.worst.index, parity.worst.logged, parity.worst.again) == ("top", 1, 0.25, 0.75)
    assert parity.mean == pytest.approx(0.65 / 8)
    assert parity.within(0.5)
    assert not parity.within(0.499)
    counts = dict(parity.histogram())
    assert counts["≤ 1e-9"] == 6
    assert counts["≤ 1"] == 2


def test_ties_keep_the_order_of_the_candidates() -> None:
    assert Parity().update("r", column(0.5, 0.5, 0.5), column(0.4, 0.4, 0.4)).num_flipped == 0


def test_other_tasks_count_for_the_difference_and_not_for_the_order() -> None:
    parity = Parity().update("r", np.float32([[0.2, 0.9], [0.1, 0.8]]), np.float32([[0.2, 0.1], [0.1, 0.8]]))
    assert parity.worst is not None
    assert (parity.num_flipped, parity.worst.index, parity.worst.task) == (0, 0, 1)


@pytest.mark.parametrize("pair", [(0.5, math.nan), (math.nan, 0.5), (math.nan, math.nan), (0.5, math.inf)])
def test_what_is_no_number_never_passes(pair: tuple[float, float]) -> None:
    parity = Parity().update("r", column(pair[0]), column(pair[1]))
    assert not parity.within(1e9)
    assert dict(parity.histogram())["not a number"] == 1
    found = json.loads(json.dumps(parity.as_dict(), allow_nan=False))
    assert found["largest_difference"] is None


def test_merge_over_shards_is_the_whole() -> None:
    rng = np.random.default_rng(2)
    requests = [(f"r{n}", rng.random((n, 1), np.float32), rng.random((n, 1), np.float32)) for n in range(8)]
    whole, first, second = Parity(), Parity(), Parity()
    for request in requests:
        whole.update(*request)
    for n, request in enumerate(requests):
        (first if n % 3 else second).update(*request)
    merged, expected = second.merge(first).as_dict(), whole.as_dict()
    assert merged == {**expected, "mean_difference": pytest.approx(expected["mean_difference"])}


def test_no_candidates_and_no_requests() -> None:
    parity = Parity().update("empty", np.empty((0, 1), np.float32), np.empty((0, 1), np.float32))
    assert parity.num_requests == 1
    assert parity.within(0)
    assert Parity().as_dict()["worst"] is None
