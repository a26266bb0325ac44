"""Delta export: a chain of deltas equals a full export bit for bit, and whatever does not fit is told and never applied in part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from ninerank.embedding import rowfile
from ninerank.embedding.changes import Changes, Column, RowBlock, StaticTracker
from ninerank.embedding.delta import Delta, DeltaManifest, DeltaWriter, Position, Replica
from ninerank.embedding.dynamic import Capacity, DynamicSource, DynamicTable, DynamicTableConfig, Frequency, FusedRule, LastSeen
from ninerank.embedding.table import TableLayout
from ninerank.errors import BundleError
from ninerank.fusion.kernels.embedding_update import Adagrad

IDS = [0, -1, 2**63 - 1, -(2**63), *range(1, 16), *(n << 50 for n in range(1, 5))]
LAYOUT = TableLayout.of({"user": 7, "country": 3})


def dynamic_table(seed: int = 0) -> DynamicTable:
    config = DynamicTableConfig(
        admission=Frequency(threshold=2),
        eviction=(Capacity(max_rows=8, by="lfu", fill=0.5),),
        evict_every=0,
        reserve_rows=4,
        track_changes=True,
    )
    rule_ = FusedRule(Adagrad(), 0.3)
    return DynamicTable("item", {"deep": 3, "linear": 1}, config, seed=seed, rule=rule_)


class Trained:
    """A dynamic and two static tables in training, with a writer."""

    def __init__(self, directory: Path, *, state: bool = False) -> None:
        self.item = dynamic_table()
        self.storage = {"value.deep": torch.zeros(10, 3), "value.linear": torch.zeros(10, 1)}
        self.tracker = StaticTracker(LAYOUT, self.storage)
        self.sources = {"item": DynamicSource(self.item, state=state), **self.tracker.sources()}
        self.writer = DeltaWriter(directory, self.sources)
        self.step = 0

    def train(self, ids: list[int], rows: list[int]) -> None:
        self.step += 1
        found = self.item.lookup(torch.tensor(ids, dtype=torch.int64), train=True, step=self.step)
        for group in ("deep", "linear"):
            (self.item.rows(group, found).sum() * (self.step % 3 - 1.1)).backward()
        self.item.update()
        self.item.finish_step(self.step)
        row_K = torch.tensor(sorted(set(rows)), dtype=torch.int64)
        for tensor in self.storage.values():
            tensor[row_K] += self.step
        self.tracker.mark(row_K)

    def full(self, directory: Path) -> Replica:
        """What a base of this moment holds, by way of files."""
        shutil.rmtree(directory, ignore_errors=True)
        sources = {"item": DynamicSource(self.item, state=self.sources["item"]._state), **self.tracker.sources()}  # type: ignore[attr-defined]
        for source in sources.values():
            source.forget = lambda version: None  # type: ignore[method-assign]
        return Replica.load(DeltaWriter(directory, sources).base("full"))


def assert_same_rows(one: Replica, other: Replica) -> None:
    assert one.tables.keys() == other.tables.keys()
    for name, rows in one.tables.items():
        theirs = other.tables[name]
        assert rows.ids.tobytes() == theirs.ids.tobytes(), name
        assert rows.columns.keys() == theirs.columns.keys()
        for column, values in rows.columns.items():
            assert (values.dtype, values.shape) == (theirs.columns[column].dtype, theirs.columns[column].shape)
            assert values.tobytes() == theirs.columns[column].tobytes(), (name, column)


class HistoryMachine(RuleBasedStateMachine):
    """Training, eviction, removal and return of ids, bases and deltas in any order; a replica and a table follow by files alone."""

    @initialize(state=st.booleans())
    def begin(self, state: bool) -> None:
        self.directory = Path(self.make_directory())
        self.trained = Trained(self.directory / "chain", state=state)
        self.bases = 0
        self.base()

    def make_directory(self) -> str:
        raise AssertionError("the test gives it")

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=15), rows=st.lists(st.integers(0, 9), max_size=5))
    def train(self, ids: list[int], rows: list[int]) -> None:
        self.trained.train(ids, rows)

    @rule(max_age=st.integers(0, 2))
    def evict(self, max_age: int) -> None:
        self.trained.item.evict(LastSeen(max_age=max_age))

    @rule(ids=st.lists(st.sampled_from(IDS), max_size=5))
    def remove(self, ids: list[int]) -> None:
        self.trained.item.remove(torch.tensor(ids, dtype=torch.int64))

    @rule()
    def base(self) -> None:
        self.bases += 1
        self.replica = Replica.load(self.trained.writer.base(f"v{self.bases}"))
        self.follower = dynamic_table(seed=9)
        self.follower.apply(Changes(self.replica.tables["item"], np.empty(0, np.int64)))
        assert_same_rows(self.replica, self.trained.full(self.directory / "full"))

    @rule(times=st.integers(1, 2))
    def delta(self, times: int) -> None:
        for _ in range(times):
            path = self.trained.writer.delta()
            before = self.replica
            after = before.apply(path)
            self.follower.apply(rowfile_changes(path, before.position))
            assert before.follow(self.directory / "chain").position == after.position
            self.replica = after
        full = self.trained.full(self.directory / "full")
        assert_same_rows(self.replica, full)
        mine = {name: self.follower.state()[name] for name in ("id", *full.tables["item"].columns)}
        assert mine.pop("id").tolist() == full.tables["item"].ids.tolist()
        for name, values in mine.items():
            assert values.numpy().tobytes() == full.tables["item"].columns[name].tobytes(), name


def rowfile_changes(path: Path, position: Position) -> Changes:
    return Delta.read(path, position).changes["item"]


def test_any_history_equals_a_full_export(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ninerank.files.sync", lambda path: None)  # hundreds of exports, none of which has to outlive a power cut

    from hypothesis.stateful import run_state_machine_as_test

    class Machine(HistoryMachine):
        def make_directory(self) -> str:
            return str(tmp_path_factory.mktemp("history"))

        def teardown(self) -> None:
            shutil.rmtree(getattr(self, "directory", ""), ignore_errors=True)

    run_state_machine_as_test(Machine, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path / "chain")


def chain(trained: Trained, deltas: int) -> tuple[Replica, list[Path]]:
    """A base and deltas; item ids 1, 2, 3 come and go."""
    trained.train([1, 1, 2, 2], [0, 8])
    base = Replica.load(trained.writer.base("v1"))
    paths = []
    for i in range(deltas):
        trained.train([i, i, i + 1, i + 1], [i])
        trained.item.remove(torch.tensor([i - 1]))
        paths.append(trained.writer.delta())
    return base, paths


def manifest_of(path: Path) -> DeltaManifest:
    return rowfile.read_manifest(path, DeltaManifest, "delta", 1)[0]


def test_deltas_hold_what_changed_and_no_more(trained: Trained) -> None:
    base, paths = chain(trained, 3)
    tables = manifest_of(paths[1]).tables
    assert (tables["item"].upserts.rows, tables["item"].removed.rows) == (2, 1)
    assert (tables["user"].upserts.rows, tables["country"].upserts.rows) == (1, 0)
    empty = trained.writer.delta()
    assert all(table.upserts.rows == table.removed.rows == 0 for table in manifest_of(empty).tables.values())
    last = base.follow(paths[0].parent)
    assert last.position.sequence == 4
    assert base.position.sequence == 0


def test_an_id_that_left_and_came_back_is_an_upsert(trained: Trained) -> None:
    base, _ = chain(trained, 0)
    trained.item.remove(torch.tensor([1, 2]))
    trained.train([1, 1], [])
    path = trained.writer.delta()
    changes = rowfile_changes(path, base.position)
    assert (changes.upserts.ids.tolist(), changes.removed.tolist()) == ([1], [2])


def test_a_gap_a_repeat_and_another_base_are_told(trained: Trained, tmp_path: Path) -> None:
    base, paths = chain(trained, 3)
    first = base.apply(paths[0])
    with pytest.raises(BundleError, match="gap: delta 3 of 'v1', the next one is 1"):
        base.apply(paths[2])
    with pytest.raises(BundleError, match="repeat: delta 1 of 'v1', 1 were applied already"):
        first.apply(paths[0])
    other = Trained(tmp_path / "other")
    other_base, other_paths = chain(other, 3)
    assert other_base.position.base_sha256 == base.position.base_sha256  # the same history so far
    other = Trained(tmp_path / "third")
    other.train([5, 5], [])
    other_base = Replica.load(other.writer.base("v1"))
    with pytest.raises(BundleError, match="wrong base: the delta stands on 'v1'"):
        other_base.apply(paths[0])
    with pytest.raises(BundleError, match="wrong base: the delta stands on 'v1' .* what is loaded on 'v2'"):
        Replica.load(trained.writer.base("v2")).apply(paths[0])
    with pytest.raises(BundleError, match="is a base, a delta is needed"):
        base.apply(paths[0].parent / "base-v1")
    with pytest.raises(BundleError, match="is a delta, a base is needed"):
        Replica.load(paths[0])
    assert len(other_paths) == 3


def test_another_history_of_the_same_base_is_told(tmp_path: Path) -> None:
    """Two trainers go on from one base: their second deltas do not mix."""
    one, other = Trained(tmp_path / "one"), Trained(tmp_path / "other")
    base = Replica.load(one.writer.base("v1"))
    Replica.load(other.writer.base("v1"))
    paths = []
    for trained, word in ((one, 1), (other, 2)):
        trained.train([word, word], [])
        trained.writer.delta()
        trained.train([3, 3], [])
        paths.append(trained.writer.delta())
    first = base.apply(tmp_path / "one" / "delta-v1-000001")
    with pytest.raises(BundleError, match="wrong history"):
        first.apply(paths[1])
    assert first.apply(paths[0]).position.sequence == 2


def files_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("kind", ["base", "delta"])
def test_every_changed_byte_is_found(trained: Trained, kind: str, tmp_path: Path) -> None:
    base, paths = chain(trained, 1)
    path = paths[0] if kind == "delta" else paths[0].parent / "base-v1"
    read: Callable[[Path], Replica] = base.apply if kind == "delta" else Replica.load
    before = [values.tobytes() for rows in base.tables.values() for values in rows.columns.values()]
    rng = np.random.default_rng(0)
    for name in files_of(path):
        for damage in ("flip", "cut", "grow", "gone", "empty"):
            for _ in range(4 if damage == "flip" else 1):
                broken = tmp_path / "broken"
                shutil.rmtree(broken, ignore_errors=True)
                shutil.copytree(path, broken)
                data = bytearray((broken / name).read_bytes())
                if damage == "flip":
                    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
                changed = {"flip": data, "cut": data[:-1], "grow": data + b" ", "gone": b"", "empty": b""}[damage]
                (broken / name).write_bytes(changed)
                if damage == "gone":
                    (broken / name).unlink()
                with pytest.raises(BundleError, match="broken"):
                    read(broken)
    after = [values.tobytes() for rows in base.tables.values() for values in rows.columns.values()]
    assert after == before
    read(path)


def forged(path: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy with a changed manifest that carries the right digest."""
    shutil.copytree(path, target)
    content = json.loads((path / "manifest.json").read_bytes())["content"]
    change(content)
    (target / "manifest.json").write_bytes(rowfile._manifest_bytes(content)[0])
    return target


def rename_column(content: Any) -> None:
    columns = content["tables"]["item"]["upserts"]["columns"]
    columns["value.other"] = columns.pop("value.deep")


NONSENSE: dict[str, tuple[Callable[[Any], object], str]] = {
    "a table is gone": (lambda content: content["tables"].pop("user"), "holds the tables"),
    "another name of a column": (rename_column, "columns are"),
    "another format": (lambda content: content.update(format=2), "format 2, this version reads 1"),
    "no tables": (lambda content: content.pop("tables"), "key 'tables' is missing: is no manifest of this format"),
    "an unknown key": (lambda content: content.update(x=1), "unknown key 'x'"),
    "another number of rows": (lambda content: content["tables"]["item"]["upserts"].update(rows=7), "rows, manifest.json says 7"),
    "a file elsewhere": (lambda content: content["tables"]["item"]["upserts"].update(path="../x.arrow"), "is no manifest of this format"),
    "a type that is none": (
        lambda content: content["tables"]["item"]["upserts"]["columns"].update({"value.deep": ["object", 3]}),
        "is no manifest of this format",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_well_sealed_nonsense_is_refused(trained: Trained, tmp_path: Path, case: str) -> None:
    base, (path,) = chain(trained, 1)
    change, message = NONSENSE[case]
    with pytest.raises(BundleError, match=message):
        base.apply(forged(path, tmp_path / "forged", change))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"nonsense", b"\xff", b'{"content": 1}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(trained: Trained, data: bytes) -> None:
    base, (path,) = chain(trained, 1)
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match="is corrupt"):
        base.apply(path)


@pytest.mark.parametrize(
    ("ids", "removed", "message"),
    [
        ([2, 1], [], "rising order"),
        ([1, 1], [], "rising order"),
        ([1, 2], [2], "id 2 is both changed and gone"),
        ([], [3, 3], "rising order"),
    ],
)
def test_rows_that_make_no_sense_are_refused(ids: list[int], removed: list[int], message: str, tmp_path: Path) -> None:
    class Broken:
        columns: ClassVar = {"x": Column("float32", 2)}
        generation = 0

        def advance(self) -> int:
            return 1

        def changes(self, since: int) -> Changes:
            return Changes(RowBlock(np.array(ids, np.int64), {"x": np.zeros((len(ids), 2), np.float32)}), np.array(removed, np.int64))

        def blocks(self) -> list[RowBlock]:
            return []

        def forget(self, version: int) -> None:
            pass

    writer = DeltaWriter(tmp_path, {"t": Broken()})  # type: ignore[dict-item]
    base = Replica.load(writer.base("v1"))
    with pytest.raises(BundleError, match=message):
        base.apply(writer.delta())


def test_a_delta_of_other_columns_is_refused(tmp_path: Path) -> None:
    one, other = Trained(tmp_path / "one"), Trained(tmp_path / "other", state=True)
    base = Replica.load(one.writer.base("v1"))
    other.writer.base("v1")
    path = other.writer.delta()

    def same_base(content: Any) -> None:
        content["base_sha256"] = content["parent"] = base.position.sha256

    with pytest.raises(BundleError, match="in the base they are"):
        base.apply(forged(path, tmp_path / "forged", same_base))


def test_a_writer_needs_a_base_and_keeps_names(trained: Trained) -> None:
    with pytest.raises(BundleError, match="no base was written yet"):
        trained.writer.delta()
    for version in ("", "a/b", "../x", ".hidden", "a-b", "v" * 65):
        with pytest.raises(BundleError, match="base version"):
            trained.writer.base(version)
    trained.writer.base("v1")
    with pytest.raises(BundleError, match="exists already"):
        trained.writer.base("v1")


@pytest.mark.parametrize("reload", ["dynamic", "static"])
def test_a_table_loaded_anew_needs_a_new_base(trained: Trained, reload: str) -> None:
    chain(trained, 1)
    if reload == "dynamic":
        trained.item.load_state(trained.item.state())
    else:
        trained.tracker.mark_all()
    with pytest.raises(BundleError, match="was loaded anew after base 'v1': write a new base"):
        trained.writer.delta()
    trained.writer.base("v2")
    trained.writer.delta()


def test_a_failed_export_leaves_nothing_and_is_made_up_for(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = chain(trained, 0)
    trained.train([4, 4], [3])
    trained.item.remove(torch.tensor([1]))
    before = files_of(trained.writer.directory)

    def full_disk(directory: Path, content: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ninerank.embedding.delta.seal", full_disk)
        with pytest.raises(OSError, match="No space"):
            trained.writer.delta()
    assert files_of(trained.writer.directory) == before
    trained.train([5, 5], [])
    trained.writer.delta()
    replica = base.follow(trained.writer.directory)
    assert replica.position.sequence == 1
    assert_same_rows(replica, trained.full(trained.writer.directory / "full"))


def test_what_a_base_holds_is_no_longer_kept_in_mind(trained: Trained) -> None:
    chain(trained, 3)
    assert len(trained.item.removed) > 0
    trained.writer.base("v2")
    assert len(trained.item.removed) == 0


def test_nan_and_negative_zero_survive(tmp_path: Path) -> None:
    odd = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    tracker = StaticTracker(TableLayout.of({"t": 4}), {"x": torch.from_numpy(odd.copy()[:, None])})
    writer = DeltaWriter(tmp_path, tracker.sources())
    base = Replica.load(writer.base("v1"))
    tracker.mark(torch.arange(4))
    replica = base.apply(writer.delta())
    assert replica.tables["t"].columns["x"].tobytes() == odd.tobytes()


def test_following_refuses_what_does_not_fit(trained: Trained) -> None:
    table = dynamic_table()
    rows = np.array([1, 2])
    fitting = {"value.deep": np.ones((2, 3), np.float32), "value.linear": np.ones((2, 1), np.float32)}
    for columns in (
        {"value.deep": fitting["value.deep"]},
        {**fitting, "value.deep": np.ones((2, 4), np.float32)},
        {**fitting, "value.wide": np.ones((2, 4), np.float32)},
        {**fitting, "value.deep": np.ones((2, 3), np.float64)},
        {**fitting, "count": np.array([1, 0])},
    ):
        with pytest.raises(BundleError, match="changes h"):
            table.apply(Changes(RowBlock(rows, columns), np.empty(0, np.int64)))
    assert len(table) == 0
    table.apply(Changes(RowBlock(rows, fitting), np.array([7])))
    assert table.state()["count"].tolist() == [1, 1]
    table.lookup(torch.tensor([1]), train=True, step=3)
    with pytest.raises(RuntimeError, match="middle of step 3"):
        table.apply(Changes(RowBlock(rows, fitting), np.empty(0, np.int64)))


def test_export_needs_tracking() -> None:
    table = DynamicTable("t", {"deep": 1}, DynamicTableConfig(reserve_rows=4), seed=0)
    with pytest.raises(ValueError, match="track_changes"):
        DynamicSource(table)


def test_arrays_must_share_the_layout() -> None:
    with pytest.raises(ValueError, match="9 rows, the layout 10"):
        StaticTracker(LAYOUT, {"x": torch.zeros(9, 1)})
