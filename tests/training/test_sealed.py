from pathlib import Path

import pytest

from ninerank.errors import CheckpointError
from ninerank.training import sealed


def draft(target: Path, **files: str) -> sealed.Draft:
    made = sealed.Draft(target)
    for name, content in files.items():
        made.add(f"{name}.txt", content.encode())
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    draft(tmp_path / "box", a="alpha", b="beta").rename({"step": 3})
    return tmp_path / "box"


def test_what_was_written_is_found(target):
    whole = sealed.verify(target)
    assert whole.extra == {"step": 3}
    assert {name: path.read_text() for name, path in whole.paths.items()} == {"a.txt": "alpha", "b.txt": "beta"}
    assert sorted(path.name for path in target.parent.iterdir()) == ["box"]


def test_every_flipped_bit_is_found_and_named(target):
    for path in sorted(target.iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                sealed.verify(target)
        path.write_bytes(whole)
    sealed.verify(target)


def test_truncation_and_absence_are_told_apart(target):
    (target / "b.txt").write_text("bet")
    with pytest.raises(CheckpointError, match=r"b\.txt: has 3 bytes, manifest\.json says 4.*truncated"):
        sealed.verify(target)
    (target / "b.txt").unlink()
    with pytest.raises(CheckpointError, match=r"b\.txt: is missing"):
        sealed.verify(target)
    (target / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match=r"manifest\.json: is corrupt"):
        sealed.verify(target)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        sealed.verify(target.parent)


def test_renaming_again_replaces_the_whole(target):
    draft(target, c="gamma").rename({})
    assert set(sealed.verify(target).paths) == {"c.txt"}
    assert sorted(path.name for path in target.iterdir()) == ["c.txt", "manifest.json"]
    assert [path.name for path in target.parent.iterdir()] == ["box"]


def test_until_it_is_renamed_a_draft_changes_nothing(target):
    begun = draft(target, a="half")
    assert sealed.verify(target).paths["a.txt"].read_text() == "alpha"
    begun.discard()
    assert [path.name for path in target.parent.iterdir()] == ["box"]
    sealed.verify(target)


def test_what_was_set_aside_comes_back_if_the_new_one_did_not(target, monkeypatch):
    """A kill between the two renames: the old directory is hidden, the new one not yet in place."""
    inner = Path.rename

    def stop(path: Path, to: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return inner(path, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        draft(target, c="gamma").rename({})
    assert not target.exists()
    sealed.recover(target.parent, "b*")
    assert sealed.verify(target).paths["a.txt"].read_text() == "alpha"
    assert [path.name for path in target.parent.iterdir()] == ["box"]


def test_recovery_clears_away_what_is_half_done_and_touches_nothing_else(target):
    for name in (".box.0123abcd.old", ".box.0123abcd.tmp", ".other.0123abcd.tmp"):
        (target.parent / name).mkdir()
    sealed.recover(target.parent, "box")
    assert sorted(path.name for path in target.parent.iterdir()) == [".other.0123abcd.tmp", "box"]
    sealed.verify(target)


def test_a_file_of_another_process_must_be_there_as_it_was_written(tmp_path):
    begun = draft(tmp_path / "box", a="alpha")
    with pytest.raises(CheckpointError, match=r"far\.txt: is not there as it was written; all processes must write to one file system"):
        begun.enter("far.txt", "0" * 64, 5)
    with pytest.raises(CheckpointError, match=r"a\.txt: is not there as it was written"):
        begun.enter("a.txt", "0" * 64, 6)


def test_several_processes_share_the_reading(target):
    """Each finds damage in its own share; a missing or short file is seen by all."""
    (target / "b.txt").write_text("bet!")
    sealed.verify(target, rank=0, world_size=2)
    with pytest.raises(CheckpointError, match=r"b\.txt: .* corrupt"):
        sealed.verify(target, rank=1, world_size=2)
    (target / "b.txt").write_text("b")
    for rank in (0, 1):
        with pytest.raises(CheckpointError, match="truncated"):
            sealed.verify(target, rank=rank, world_size=2)


def test_release_keeps_one_generation(tmp_path):
    for content in ("one", "two", "two"):
        draft(tmp_path / "best", w=content).release({"epoch": content})
        assert sealed.verify(tmp_path / "best").paths["w.txt"].read_text() == content
        assert len(list((tmp_path / "best").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
