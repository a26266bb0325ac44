import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from ninerank.errors import SpecError
from ninerank.training.loss import LossConfig, binary_cross_entropy, check_task_weights


def draw(rows: int, tasks: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, tasks, generator=generator) * 3
    return logits, (torch.rand(rows, tasks, generator=generator) < 0.4).float(), torch.rand(rows, generator=generator) + 0.1


def test_one_task_without_weights_is_the_mean():
    logits, label, _ = draw(7, 1)
    torch.testing.assert_close(binary_cross_entropy(logits, label), functional.binary_cross_entropy_with_logits(logits, label))


def test_weights_make_a_weighted_mean_and_tasks_are_summed():
    logits, label, weight = draw(9, 2)
    each = functional.binary_cross_entropy_with_logits(logits.double(), label.double(), reduction="none")
    expected = sum(scale * (each[:, task] * weight).sum() / weight.double().sum() for task, scale in enumerate((1.0, 0.25)))
    torch.testing.assert_close(binary_cross_entropy(logits, label, weight, (1.0, 0.25)).double(), expected, rtol=1e-6, atol=0)


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 50))
def test_scaling_all_weights_changes_nothing(factor, seed):
    logits, label, weight = draw(5, 1, seed)
    torch.testing.assert_close(binary_cross_entropy(logits, label, weight * factor), binary_cross_entropy(logits, label, weight))


def test_integer_weights_are_repetitions():
    logits, label, _ = draw(4, 1)
    times = torch.tensor([3, 0, 1, 2])
    repeated = binary_cross_entropy(logits.repeat_interleave(times, 0), label.repeat_interleave(times, 0))
    torch.testing.assert_close(binary_cross_entropy(logits, label, times.float()), repeated)


def test_a_batch_without_weight_gives_zero_and_no_nan_gradient():
    logits = torch.ones(3, 1, requires_grad=True)
    loss = binary_cross_entropy(logits, torch.ones(3, 1), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(3, 1))


def test_half_precision_logits_are_judged_in_float32():
    assert binary_cross_entropy(torch.zeros(2, 1, dtype=torch.bfloat16), torch.ones(2, 1)).dtype == torch.float32


def test_unknown_task_is_refused_by_name():
    with pytest.raises(SpecError, match="'clikc' is not a label.*click, buy"):
        check_task_weights(LossConfig(task_weights={"clikc": 1.0}), ("click", "buy"))
