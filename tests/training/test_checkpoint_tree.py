import pytest
import torch

from ninerank.embedding.dynamic import shard_of
from ninerank.embedding.shard import Shard
from ninerank.training.checkpoint import ById, PerProcess
from ninerank.training.checkpoint.staging import HostBuffers
from ninerank.training.checkpoint.tree import Leaf, flatten_tree, whole


def test_names_join_keys():
    tree = {
        "model": {"tower.w": torch.ones(2), "tables": {"user": Shard((4, 2), (2, 0), torch.ones(2, 2))}},
        "dynamic": {"item": ById({"id": torch.tensor([3])})},
        "random": PerProcess({"cpu": torch.ones(1)}),
    }
    names = {"model.tables.user", "dynamic.item[0].id", "random[0].cpu"}
    first = flatten_tree(tree, rank=0, world_size=2)
    assert set(first.leaves) == names | {"model.tower.w"}
    assert {name: part.kind for name, part in first.parts.items()} == {"dynamic.item": "by_id", "random": "per_process"}
    assert set(flatten_tree(tree, rank=1, world_size=2).leaves) == {name.replace("[0]", "[1]") for name in names}


def test_whether_ids_are_where_they_belong_is_noted():
    ids = torch.arange(20)
    own = ids[torch.from_numpy(shard_of(ids.numpy(), 3) == 2)]
    for held, rank, world_size, dealt in ((own, 2, 3, True), (own, 1, 3, False), (ids, 2, 3, False), (ids, 0, 1, True)):
        for state in ({"id": held}, {"id": own[:0], "pending.id": held}):
            assert flatten_tree({"t": ById(state)}, rank=rank, world_size=world_size).parts["t"].is_dealt is dealt


def test_blocks_without_elements_are_left_out_but_empty_tensors_are_not():
    tree = {
        "a": Shard((4, 2), (4, 0), torch.ones(0, 2)),
        "b": [Shard((4, 2), (0, 0), torch.ones(0, 2)), Shard((4, 2), (0, 0), torch.ones(1, 2))],
    }
    leaves = flatten_tree(tree | {"c": Shard((0, 2), (0, 0), torch.ones(0, 2))}, rank=1, world_size=2).leaves
    assert {name: [tuple(shard.tensor.shape) for shard in leaf.shards] for name, leaf in leaves.items()} == {"b": [(1, 2)], "c": [(0, 2)]}


def test_what_has_no_place_is_refused():
    for wrong in (3, "text", [torch.ones(1)]):
        with pytest.raises(TypeError, match=r"model\.w: (int|str|list) has no place in a checkpoint"):
            flatten_tree({"model": {"w": wrong}}, rank=0, world_size=1)
    with pytest.raises(ValueError, match="needs a column 'id'; there are: value.deep"):
        ById({"value.deep": torch.ones(1)})
    with pytest.raises(ValueError, match=r"two entries .* 'a\.b'"):
        flatten_tree({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, rank=0, world_size=1)


def test_buffers_are_used_again_while_shapes_stay():
    buffers, tensor = HostBuffers(), torch.arange(6.0).view(2, 3)
    leaves = {"w": Leaf((whole(tensor),)), "own": Leaf((whole(tensor),), is_own=True)}
    first = buffers.stage(leaves)
    assert first["own"] is leaves["own"]
    place = first["w"].shards[0].tensor.data_ptr()
    tensor += 1
    assert first["w"].shards[0].tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert buffers.stage(leaves)["w"].shards[0].tensor.data_ptr() == place
    assert torch.equal(buffers.stage(leaves)["w"].shards[0].tensor, tensor)
    grown = buffers.stage({"w": Leaf((whole(torch.ones(4, 3)),))})
    assert torch.equal(grown["w"].shards[0].tensor, torch.ones(4, 3))
    assert buffers.num_bytes == 48
    buffers.stage({})
    assert buffers.num_bytes == 0
