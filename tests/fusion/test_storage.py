"""Tables' memory behaves as any other tensor."""

import copy

import pytest
import torch

from ninerank.fusion.kernels import storage


@pytest.mark.parametrize("rows", [0, 1, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_zeros_that_can_be_written(rows: int, dtype: torch.dtype) -> None:
    tensor = storage.zeros((rows, 16), dtype)
    assert tensor.shape == (rows, 16)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(3)
    twin = copy.deepcopy(tensor)
    tensor.zero_()
    assert bool((twin == 3).all())


def test_memory_outlives_the_name_it_was_given() -> None:
    part = storage.zeros((300_000, 16))[150_000:]
    part.fill_(7.0)
    assert float(part.sum()) == 150_000 * 16 * 7
