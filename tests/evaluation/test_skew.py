"""Planted skew is found, named and blamed: a shifted feature, a default from the cache, a value from the future."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.evaluation.replay import replay
from ninerank.evaluation.replayer import BundleReplayer
from ninerank.evaluation.skew import SideSnapshot, Skew, blame
from ninerank.evaluation.snapshot import Snapshot
from ninerank.predictor.engine import Engine
from ninerank.predictor.requestlog import LoggedRequest

HOUR_US = 3_600_000_000
NUM_ITEMS, NUM_REQUESTS = 30, 12


@dataclass(frozen=True)
class World:
    """Items whose price changes every hour; requests at half past, over what they should have seen."""

    replayer: BundleReplayer
    engine: Engine
    snapshot: Path

    def price(self, item: int, hour: int) -> float:
        return 1.0 + item + 0.25 * hour

    def request(self, n: int, prices: list[float | None] | None = None, items: list[str] | None = None) -> LoggedRequest:
        """Request n as served: with the right features, or with these."""
        ids = [3 * n % NUM_ITEMS, (3 * n + 7) % NUM_ITEMS, (3 * n + 11) % NUM_ITEMS]
        columns = {"item": items or [f"i{i}" for i in ids], "price": prices or [self.price(i, n) for i in ids]}
        user = pa.record_batch({"user": [f"u{n}"], "hour": [n]})
        features = self.engine.schema.rank_input(user, pa.record_batch(columns))
        scores_NT = self.engine.rank(features).scores_NT
        known = pa.array([f"i{i}" for i in ids])
        manifest = self.engine.manifest
        about = (manifest.model_name, manifest.model_version, manifest.spec_digest, known, features, scores_NT)
        return LoggedRequest(f"r{n}", n * HOUR_US + HOUR_US // 2, *about)

    def skew(self, **options: float) -> Skew:
        snapshot = Snapshot(self.snapshot, self.engine.schema.item, key="item", time="valid_from")
        return Skew([SideSnapshot("item", snapshot)], tolerance=1e-6, **options)


@pytest.fixture(scope="module")
def world(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    engine = Engine.load(bundle_dir, "cpu")
    made = World(BundleReplayer(engine, str(bundle_dir)), engine, tmp_path_factory.mktemp("snapshot") / "items.parquet")
    rows = [(f"i{i}", hour * HOUR_US, made.price(i, hour)) for i in range(NUM_ITEMS) for hour in range(NUM_REQUESTS + 3)]
    pq.write_table(pa.table(dict(zip(("item", "valid_from", "price"), zip(*rows, strict=True), strict=True))), made.snapshot)
    return made


def test_features_as_they_should_be_pass(world: World) -> None:
    found = replay([world.request(n) for n in range(NUM_REQUESTS)], world.replayer, skew=world.skew())
    assert found.passed
    assert found.skew is not None
    assert found.skew.found() == []
    assert found.skew.columns["price"].compared == 3 * NUM_REQUESTS
    assert found.skew.parity.largest == 0.0


def test_each_planted_skew_is_named_and_blamed(world: World) -> None:
    requests = [world.request(n) for n in range(NUM_REQUESTS)]
    shifted, missing, leaked = (requests[n].input.items.column("price").to_pylist() for n in (2, 5, 8))
    shifted[1] += 40.0
    missing[0] = None
    leaked[2] += 0.5  # the price of two hours later
    for n, prices in ((2, shifted), (5, missing), (8, leaked)):
        requests[n] = world.request(n, prices)
    found = replay(requests, world.replayer, skew=world.skew())
    assert not found.passed
    assert found.parity.largest <= 1e-6, "the scores follow from the features that were used"
    assert found.skew is not None
    own = found.skew.columns["price"]
    assert (own.shifted, own.defaulted, own.unexpected, own.future, own.blamed) == (1, 1, 0, 1, 3)
    assert found.skew.columns["item"].differing == 0
    assert found.skew.num_unexplained == 0
    places = {kind: (example.request_id, example.candidate) for kind, example in own.examples.items()}
    assert places == {"shifted": ("r2", 1), "defaulted": ("r5", 0), "future": ("r8", 2)}
    assert own.examples["future"].valid_from_us == 10 * HOUR_US
    failed = {check.name for check in found.checks if not check.passed}
    assert failed >= {"shifted values of price", "defaulted values of price", "future values of price"}
    assert "largest score difference from the snapshot's features" in failed


def test_the_guilty_column_is_told_from_the_one_that_changes_nothing(world: World, tmp_path: Path) -> None:
    """Item ids differ too, but only between ids that the model does not know: the price alone moves scores."""
    request = world.request(4, prices=[1.0, 2.0, 90.0], items=["new1", "new2", "new3"])
    table = pq.read_table(world.snapshot)
    renamed = table.append_column("id", table["item"]).set_column(0, "item", pa.array([f"other{n % 30}" for n in range(len(table))]))
    pq.write_table(renamed, tmp_path / "items.parquet")
    snapshot = Snapshot(tmp_path / "items.parquet", world.engine.schema.item, key="id", time="valid_from")
    skew = Skew([SideSnapshot("item", snapshot)], tolerance=1e-6).update(request, lambda f: world.replayer.score(request, f))
    assert skew.columns["item"].shifted == 3
    assert (skew.columns["price"].blamed, skew.columns["item"].blamed) == (1, 0)


def test_merge_over_shares_is_the_whole(world: World) -> None:
    requests = [world.request(n, [5.0 * n, None, 1.0] if n % 2 else None) for n in range(NUM_REQUESTS)]
    score = {request.request_id: request for request in requests}

    def compared(some: list[LoggedRequest]) -> Skew:
        skew = world.skew()
        for request in some:
            skew.update(request, lambda f, request=request: world.replayer.score(score[request.request_id], f))
        return skew

    merged = compared(requests[::2]).merge(compared(requests[1::2])).as_dict()
    whole = compared(requests).as_dict()
    for found in (merged, whole):
        found["parity"]["mean_difference"] = pytest.approx(found["parity"]["mean_difference"])
    assert merged == whole


def test_blame_is_bounded_and_a_request_without_ids_is_refused(world: World) -> None:
    skew = world.skew(most_blamed=1)
    for n in (1, 2):
        request = world.request(n, [50.0, 60.0, 70.0])
        skew.update(request, lambda f, request=request: world.replayer.score(request, f))
    assert (skew.num_blamed, skew.columns["price"].blamed) == (1, 1)
    anonymous = copy.copy(world.request(3))
    object.__setattr__(anonymous, "candidate_ids", None)
    snapshot = Snapshot(world.snapshot, world.engine.schema.item.remove(0), key="item", time="valid_from")
    object.__setattr__(snapshot, "key", "nowhere")
    with pytest.raises(DataError, match="'r3' was logged without candidate ids, and 'nowhere' is no item feature"):
        Skew([SideSnapshot("item", snapshot)], tolerance=0.0).update(anonymous, lambda f: np.zeros((3, 1), np.float32))


@given(guilty=st.sets(st.integers(0, 30), min_size=1, max_size=5), num_columns=st.integers(31, 60))
def test_blame_finds_exactly_what_is_needed(guilty: set[int], num_columns: int) -> None:
    columns = [f"f{n}" for n in range(num_columns)]
    needed = {f"f{n}" for n in guilty}
    assert set(blame(columns, lambda kept: needed <= set(kept))) == needed
