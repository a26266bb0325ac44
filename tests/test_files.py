"""Files and directories appear whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from ninerank.files import creating, replacing, sha256


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_appears_with_all_its_files(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with creating(target) as temporary:
        (temporary / "tables").mkdir()
        (temporary / "tables" / "deep.bin").write_bytes(b"rows")
        assert not target.exists()
    assert (target / "tables" / "deep.bin").read_bytes() == b"rows"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with creating(tmp_path / "bundle") as temporary:
            (temporary / "a").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "a.json"
    with pytest.raises(FileNotFoundError) as error, replacing(target) as temporary:
        temporary.write_text("x")
    assert error.value.filename == str(target)


def test_a_directory_that_exists_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with pytest.raises(FileExistsError, match="exists already"), creating(target):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
