"""First values: the right distribution, from the id alone, the same bits everywhere."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.embedding.dynamic.initial import _normal, initial_values

EXACT = statistics.NormalDist()
GOLDEN = [[1007372607, 1006896944, 3147938983], [3141575853, 997797826, 3154087842], [1003003794, 1018441129, 3161124759]]


def draw(ids: object, dim: int = 8, seed: int = 1, group: str = "deep", table: str = "item", std: float = 1.0) -> np.ndarray:
    return initial_values(np.asarray(ids, np.int64), dim, seed=seed, group=group, table=table, std=std)


@given(st.integers(0, 2**64 - 1))
def test_inverse_of_the_normal_distribution(word: int) -> None:
    tail = ((word >> 12) + 0.5) * 2.0**-53
    wanted = EXACT.inv_cdf(tail) * (1 if word & 1 else -1)
    assert _normal(np.uint64(word)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("word", [0, 1, 2**64 - 1, 2**64 - 2, 1 << 12, 1 << 30, 1 << 51, 1 << 60])
def test_ends_of_the_distribution(word: int) -> None:
    tail = ((word >> 12) + 0.5) * 2.0**-53
    assert abs(_normal(np.uint64(word))) == pytest.approx(-EXACT.inv_cdf(tail), rel=1e-6, abs=1e-9)
    assert abs(_normal(np.uint64(word))) < 8.3


@pytest.mark.parametrize("ids", [np.arange(50_000), np.arange(50_000) << 44, np.random.default_rng(0).integers(-(2**62), 2**62, 50_000)])
def test_moments_and_independence(ids: np.ndarray) -> None:
    values = draw(ids).astype(np.float64)
    count = values.size
    assert abs(values.mean()) < 5 / np.sqrt(count)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / count)
    correlation = np.corrcoef(np.concatenate([values[1:], values[:-1]], axis=1), rowvar=False)
    assert np.abs(correlation - np.eye(16)).max() < 6 / np.sqrt(len(ids))
    cells = np.histogram(values, [-np.inf, *(EXACT.inv_cdf(q / 64) for q in range(1, 64)), np.inf])[0]
    assert ((cells - count / 64) ** 2).sum() / (count / 64) < 63 + 6 * np.sqrt(2 * 63)


def test_a_value_depends_on_seed_group_table_id_and_column_alone() -> None:
    base = draw([3, 4, 5], dim=4)
    assert (draw([5, 3], dim=4) == base[[2, 0]]).all()
    assert (draw([3, 4, 5], dim=2) == base[:, :2]).all()
    for other in (draw([3, 4, 5], 4, seed=2), draw([3, 4, 5], 4, group="linear"), draw([3, 4, 5], 4, table="user"), draw([13, 14, 15], 4)):
        assert (other != base).all()


def test_golden_values() -> None:
    """The bits are part of the format: a model trained on one machine grows the same rows on another."""
    values = draw([0, -1, 2**63 - 1], dim=3, seed=7, std=0.01)
    assert values.view(np.uint32).tolist() == GOLDEN
