from pathlib import Path

import pytest
import torch

from ninerank.errors import CheckpointError
from ninerank.training.checkpoint import BestWeights, CheckpointStore, load_weights
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


def test_best_weights_are_the_last_ones_saved(tmp_path):
    best = BestWeights(tmp_path / "best", spec_digest="d")
    for epoch in (1, 2):
        best.save({"w": torch.full((2,), float(epoch))}, epoch=epoch)
    assert torch.equal(best.load()["w"], torch.full((2,), 2.0))
    with pytest.raises(CheckpointError, match="is missing"):
        BestWeights(tmp_path / "none", spec_digest="d").load()


def test_weights_of_another_model_are_refused():
    with pytest.raises(CheckpointError, match=r"best: does not fit the model.*bias"):
        load_weights(torch.nn.Linear(2, 3), {"weight": torch.ones(3, 2)}, "best")


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
