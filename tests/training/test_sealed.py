from pathlib import Path

import pytest

from ninerank.errors import CheckpointError
from ninerank.training import sealed


def text(content: str) -> sealed.Writer:
    return lambda path: path.write_text(content) and None


@pytest.fixture
def target(tmp_path: Path) -> Path:
    sealed.write(tmp_path / "box", {"a.txt": text("alpha"), "b.txt": text("beta")}, {"step": 3})
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


def test_writing_again_replaces_the_whole(target):
    sealed.write(target, {"c.txt": text("gamma")}, {})
    assert set(sealed.verify(target).paths) == {"c.txt"}
    assert sorted(path.name for path in target.iterdir()) == ["c.txt", "manifest.json"]


def test_a_failed_write_leaves_the_old_whole(target):
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sealed.write(target, {"a.txt": fail}, {})
    with pytest.raises(OSError, match="disk full"):
        sealed.replace(target, {"a.txt": fail}, {})
    assert sealed.verify(target).paths["a.txt"].read_text() == "alpha"


def test_replace_keeps_one_generation(tmp_path):
    for content in ("one", "two", "two"):
        sealed.replace(tmp_path / "best", {"w.txt": text(content)}, {"epoch": content})
        assert sealed.verify(tmp_path / "best").paths["w.txt"].read_text() == content
        assert len(list((tmp_path / "best").iterdir())) == 2
