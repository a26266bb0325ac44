from pathlib import Path

import pytest
import torch

from ninerank.embedding.shard import Shard
from ninerank.errors import CheckpointError
from ninerank.training import sealed
from ninerank.training.checkpoint import BestWeights, ById, CheckpointStore, PerProcess
from ninerank.training.state import flatten, restore

STATE = {"epoch": 1, "best": None, "name": "naïve"}


def make_store(folder: Path, keep_last: int = 2, digest: str = "d1") -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", keep_last=keep_last, spec_digest=digest)


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, {"model": {"w": torch.full((3, 2), float(step))}, "random": {}}, STATE)


def test_round_trip(tmp_path):
    store = make_store(tmp_path)
    save(store, 7)
    checkpoint = store.load()
    assert checkpoint is not None
    assert (checkpoint.name, checkpoint.state) == ("step-7", STATE)
    assert torch.equal(checkpoint.section("model")["w"], torch.full((3, 2), 7.0))
    assert checkpoint.section("random") == {}


def test_the_newest_are_kept_by_number(tmp_path):
    store = make_store(tmp_path)
    for step in (8, 9, 10, 100):
        save(store, step)
    assert store.names() == ["step-10", "step-100"]
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-10", "step-100"]


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared_away(tmp_path):
    store = make_store(tmp_path)
    leftover = store.directory / ".step-9.123.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert store.load() is None
    save(store, 10)
    assert not leftover.exists()


def test_saving_a_step_again_replaces_it(tmp_path):
    store = make_store(tmp_path)
    save(store, 5)
    save(store, 5)
    assert store.names() == ["step-5"]


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json", "manifest.json"])
def test_a_corrupt_byte_names_the_file_and_offers_the_one_before(tmp_path, name):
    store = make_store(tmp_path)
    save(store, 5)
    path = save(store, 9) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=rf"step-9/{name}: .*corrupt.*step-5, is sound: .*--resume-from step-5"):
        store.load()
    assert store.load("step-5") is not None


def test_when_all_are_damaged_it_says_so(tmp_path):
    store = make_store(tmp_path)
    for step in (5, 9):
        path = save(store, step) / "rank-0.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"step-9/rank-0\.safetensors: has .* truncated.*; there is no sound checkpoint before it"):
        store.load()


def test_an_unknown_name_lists_those_that_are_there(tmp_path):
    store = make_store(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint 'step-4'; there are: none"):
        store.load("step-4")
    save(store, 5)
    with pytest.raises(CheckpointError, match="there are: step-5"):
        store.load("step-4")


def test_another_spec_is_refused_with_both_digests(tmp_path):
    save(make_store(tmp_path, digest="aaa"), 5)
    with pytest.raises(CheckpointError, match="spec aaa.*spec is bbb"):
        make_store(tmp_path, digest="bbb").load()
    BestWeights(tmp_path / "best", spec_digest="aaa").save({"w": torch.ones(2)}, epoch=1)
    with pytest.raises(CheckpointError, match="spec aaa.*spec is bbb"):
        BestWeights(tmp_path / "best", spec_digest="bbb").load()


def test_an_older_format_and_one_that_is_not_known_are_refused(tmp_path):
    store = make_store(tmp_path)
    save(store, 3)
    for number, form in ((5, "ninerank.checkpoint.v1"), (6, "other")):
        sealed.Draft(store.directory / f"step-{number}").rename({"format": form, "step": number, "spec_digest": "d1"})
    with pytest.raises(CheckpointError, match=r"step-5: is of the older format 'ninerank\.checkpoint\.v1'.*step-3, is sound"):
        store.load("step-5")
    with pytest.raises(CheckpointError, match=r"step-6: has format 'other', 'ninerank\.checkpoint\.v2' is needed; .*step-3, is sound"):
        store.load()


def test_a_missing_file_is_named(tmp_path):
    store = make_store(tmp_path)
    save(store, 3)
    (save(store, 5) / "rank-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-5/rank-0\.safetensors: is missing, though manifest\.json lists it.*step-3"):
        store.load()


def test_reading_in_place_fits_exactly_or_changes_nothing(tmp_path):
    store = make_store(tmp_path)
    store.save(5, {"model": {"w": torch.ones(3, 2), "b": torch.ones(2)}, "other": {"x": torch.ones(1)}}, STATE)
    checkpoint = store.load()
    assert checkpoint is not None
    right = {"w": torch.zeros(3, 2), "b": torch.zeros(2)}
    wrong = {
        "it has no 'model.c'": right | {"c": torch.zeros(1)},
        "it has 'model.b', which the model has not": {"w": right["w"]},
        r"'model.w' is torch.float32 \(3, 2\), torch.float32 \(2, 3\) is needed": right | {"w": torch.zeros(2, 3)},
        r"'model.w' is torch.float32 \(3, 2\), torch.float64 \(3, 2\) is needed": right | {"w": torch.zeros(3, 2).double()},
    }
    for message, target in wrong.items():
        with pytest.raises(CheckpointError, match=f"step-5: does not fit the model of the recipe: {message}"):
            checkpoint.read({"model": target})
    assert not any(tensor.any() for tensor in right.values())
    checkpoint.read({"model": right})
    assert all(tensor.all() for tensor in right.values())
    given = torch.zeros(1)
    assert checkpoint.section("other", into={"x": given})["x"] is given
    assert given == 1


def test_what_is_kept_apart_is_asked_for_by_its_kind(tmp_path):
    store = make_store(tmp_path)
    state = {"id": torch.tensor([-4, 2, 9]), "value.deep": torch.arange(6.0).view(3, 2)}
    store.save(5, {"dynamic": {"item": ById(state)}, "random": PerProcess({"cpu": torch.arange(4)})}, STATE)
    checkpoint = store.load()
    assert checkpoint is not None
    whole = checkpoint.by_id("dynamic.item")
    assert all(torch.equal(whole[name], state[name]) for name in state)
    shards = [checkpoint.by_id("dynamic.item", rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(torch.cat([shard["id"] for shard in shards]).tolist()) == [-4, 2, 9]
    assert torch.equal(checkpoint.own("random")["cpu"], torch.arange(4))
    assert checkpoint.section("dynamic") == checkpoint.section("random") == {}
    with pytest.raises(CheckpointError, match=r"holds no 'dynamic\.user' kept by id; it has: dynamic\.item"):
        checkpoint.by_id("dynamic.user")
    with pytest.raises(CheckpointError, match="holds no 'dynamic.item' kept per process; it has: random"):
        checkpoint.own("dynamic.item")


def test_blocks_that_leave_a_gap_are_found(tmp_path):
    store = make_store(tmp_path)
    store.save(5, {"model": {"w": Shard((4, 2), (0, 0), torch.ones(2, 2))}}, STATE)
    checkpoint = store.load()
    assert checkpoint is not None
    checkpoint.read({"model": {"w": Shard((4, 2), (1, 0), torch.zeros(1, 2))}})
    with pytest.raises(CheckpointError, match=r"'model\.w' has gaps: 1 blocks do not fill \(4, 2\)"):
        checkpoint.section("model")


def test_best_weights_are_the_last_ones_saved(tmp_path):
    best = BestWeights(tmp_path / "best", spec_digest="d")
    for epoch in (1, 2):
        best.save({"w": torch.full((2,), float(epoch))}, epoch=epoch)
    assert torch.equal(best.load()["w"], torch.full((2,), 2.0))
    with pytest.raises(CheckpointError, match="is missing"):
        BestWeights(tmp_path / "none", spec_digest="d").load()


def test_best_weights_hold_tables_by_id_under_the_names_of_one_process(tmp_path):
    best, state = BestWeights(tmp_path / "best", spec_digest="d"), {"id": torch.tensor([2, 5]), "value.deep": torch.ones(2, 3)}
    best.save({"tower.w": torch.ones(1), "managed.item": ById(state)}, epoch=1)
    found = best.load()
    assert found.keys() == {"tower.w", "managed.item.id", "managed.item.value.deep"}
    assert torch.equal(found["managed.item.id"], state["id"])


def test_a_section_is_read_into_what_is_there_and_into_new_memory(tmp_path):
    store, whole = make_store(tmp_path), torch.arange(12.0).view(4, 3)
    blocks = [Shard((4, 3), (0, 0), whole[:, :1]), Shard((4, 3), (0, 1), whole[:, 1:])]
    store.save(5, {"sparse": {"w": blocks, "v": blocks, "b": torch.ones(2)}}, STATE)
    checkpoint = store.load()
    assert checkpoint is not None
    own = {"v": Shard((4, 3), (2, 1), torch.zeros(2, 2)), "b": Shard((2,), (0,), torch.zeros(0))}
    found = checkpoint.section("sparse", into=own)
    assert torch.equal(found["w"], whole)
    assert found["v"] is own["v"]
    assert torch.equal(own["v"].tensor, whole[2:, 1:])
    assert found["b"].tensor.numel() == 0


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adagrad", "SGD"])
def test_optimizer_state_survives_flattening(kind):
    def train(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
    train(optimizer, model)
    tensors: dict[str, torch.Tensor] = {}
    form = flatten(optimizer.state_dict(), "optimizer", tensors)
    twin = torch.nn.Linear(3, 1)
    twin.load_state_dict(model.state_dict())
    twin_optimizer = getattr(torch.optim, kind)(twin.parameters(), lr=0.5, **options)
    twin_optimizer.load_state_dict(restore(form, {name: tensor.clone() for name, tensor in tensors.items()}))
    train(optimizer, model)
    train(twin_optimizer, twin)
    assert torch.equal(twin.weight, model.weight)


def test_what_has_no_place_in_a_checkpoint_is_refused():
    with pytest.raises(TypeError, match=r"optimizer\.hook: function"):
        flatten({"hook": lambda: None}, "optimizer", {})
    with pytest.raises(CheckpointError, match=r"'a\.b' is missing"):
        restore({"tensor": "a.b"}, {})
