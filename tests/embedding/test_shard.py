import pytest
import torch

from ninerank.embedding.shard import Shard


def test_block_of_a_table() -> None:
    shard = Shard((10, 4), (6, 2), torch.zeros(4, 2))
    assert shard.stop == (10, 4)
    assert not shard.is_whole
    assert Shard((3,), (0,), torch.zeros(3)).is_whole


def test_an_empty_block_is_fine() -> None:
    assert Shard((5, 4), (5, 0), torch.zeros(0, 4)).stop == (5, 4)


@pytest.mark.parametrize(("shape", "offsets"), [((10, 4), (7, 0)), ((10, 4), (-1, 0)), ((10, 4), (0, 3))])
def test_a_block_outside_the_whole_is_refused(shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        Shard(shape, offsets, torch.zeros(4, 2))


def test_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        Shard((10,), (0, 0), torch.zeros(4, 2))
