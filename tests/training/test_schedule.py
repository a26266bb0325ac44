import pytest

from ninerank.training.schedule import ConstantLr, CosineLr, PlateauLr, WarmupLr, is_gain, learning_rate


def rates(config, steps, *, total=10, reductions=0):
    return [learning_rate(config, 0.1, step=step, total_steps=total, reductions=reductions) for step in steps]


def test_constant_ignores_everything():
    assert rates(ConstantLr(), [0, 5, 1000], reductions=9) == [0.1] * 3


def test_warmup_rises_to_the_base_and_stays():
    assert rates(WarmupLr(kind="warmup", steps=5), [0, 4, 5, 99]) == pytest.approx([0.02, 0.1, 0.1, 0.1])


def test_plateau_multiplies_per_reduction_down_to_its_floor():
    config = PlateauLr(kind="reduce_on_plateau", factor=0.1, min_lr=1e-3)
    assert [rates(config, [3], reductions=n)[0] for n in range(4)] == pytest.approx([0.1, 0.01, 1e-3, 1e-3])


def test_plateau_floor_never_lifts_a_smaller_base():
    assert learning_rate(PlateauLr(kind="reduce_on_plateau"), 1e-8, step=0, total_steps=1, reductions=3) == 1e-8


def test_cosine_warms_up_then_falls_to_its_floor_at_the_last_step():
    config = CosineLr(kind="cosine", warmup_steps=2, min_lr=0.01)
    values = rates(config, range(10))
    assert values[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert values[2:] == sorted(values[2:], reverse=True)
    assert values[-1] == pytest.approx(0.01)
    assert rates(config, [50]) == pytest.approx([0.01])


def test_cosine_of_one_step_is_defined():
    assert rates(CosineLr(kind="cosine"), [0], total=1) == [0.1]


@pytest.mark.parametrize(
    ("metric", "value", "best", "gain"),
    [
        ("auc", 0.7, None, True),
        ("auc", None, None, True),
        ("auc", None, 0.5, False),
        ("auc", 0.70001, 0.7, True),
        ("auc", 0.7000005, 0.7, False),
        ("logloss", 0.3, 0.4, True),
        ("logloss", 0.4, 0.3, False),
    ],
)
def test_gain(metric, value, best, gain):
    assert is_gain(metric, value, best, 1e-6) is gain
