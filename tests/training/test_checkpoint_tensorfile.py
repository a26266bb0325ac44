import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ninerank.errors import CheckpointError
from ninerank.training.checkpoint import tensorfile
from ninerank.training.checkpoint.tensorfile import DTYPES, Content, opened, read_tensor, write_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=3)


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, Content]:
    return {name: Content(tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), st.tuples(SHAPES, st.sampled_from(list(DTYPES)))
    )
)
def test_safetensors_reads_what_was_written(tmp_path_factory, drawn):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (shape, dtype) in drawn.items()}
    digest, size = write_tensors(path, contents(tensors))
    assert (digest, size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num())
        assert torch.equal(read_tensor(path, name).nan_to_num(), tensor.nan_to_num())


def test_what_is_not_contiguous_is_written_as_it_reads(tmp_path):
    whole = torch.arange(60).view(6, 10)
    odd = torch.as_strided(torch.tensor([7]), (1,), (0,))
    tensors = {"columns": whole[:, 3:7], "turned": whole.t(), "steps": whole[::2], "odd": odd, "row": whole[1:2].expand(3, 10)}
    write_tensors(tmp_path / "x", contents(tensors))
    for name, tensor in load_file(tmp_path / "x").items():
        assert torch.equal(tensor, tensors[name]), name


def test_large_tensors_are_written_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 100)
    whole = torch.randn(33, 40)
    tensors = {
        "whole": whole,
        "columns": whole[:, :7],
        "turned": whole.t(),
        "long row": whole[:1],
        "flat": torch.arange(1000),
        "one": whole[3, 4],
    }
    digest, _ = write_tensors(tmp_path / "x", contents(tensors))
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    for name, tensor in load_file(tmp_path / "x").items():
        assert torch.equal(tensor, tensors[name]), name


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.int64), "c": torch.ones(1, dtype=torch.uint8)}
    first = write_tensors(tmp_path / "1", contents(tensors))
    assert write_tensors(tmp_path / "2", contents(dict(reversed(tensors.items())))) == first


def test_a_dtype_it_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match=r"z: a checkpoint cannot hold torch\.complex64; it can hold torch\.float64"):
        write_tensors(tmp_path / "x", contents({"z": torch.zeros(1, dtype=torch.complex64)}))


def test_a_file_is_never_written_over(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {})


def test_what_is_no_such_file(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"no header here")
    for name in ("x", "none"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be read"):
            opened(tmp_path / name)
