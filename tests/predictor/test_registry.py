"""Versions that come and go under calls: policies, refusals, drains, deltas, and nothing left behind."""

import gc
import json
import shutil
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ninerank.embedding.changes import StaticTracker
from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.delta import DeltaWriter
from ninerank.errors import BundleError
from ninerank.features.spec import FeatureSpec
from ninerank.predictor.bundle import export_bundle
from ninerank.predictor.client import PredictorClient
from ninerank.predictor.engine import Engine
from ninerank.predictor.host import ModelState, UnknownModelError
from ninerank.predictor.manifest import Manifest
from ninerank.predictor.modelstore import DirectoryStore, ObjectStore, open_store, version_order
from ninerank.predictor.policy import in_share
from ninerank.predictor.registry import ModelRegistry, RegistryConfig
from ninerank.predictor.request import RankInput
from ninerank.predictor.requestlog import read_log
from ninerank.predictor.serveconfig import ServeConfig
from ninerank.predictor.server import PredictorServer
from ninerank.predictor.service import RankService
from ninerank.predictor.telemetry import Telemetry
from ninerank.towers.model import RankingModel

Rows = Callable[..., pa.RecordBatch]


class Maker:
    """Makes services of bundles; knows which engines are still there."""

    def __init__(self) -> None:
        self.engines: list[weakref.ref[Engine]] = []
        self.retired: list[str] = []

    def make(self, bundle_dir: Path) -> RankService:
        engine = Engine.load(bundle_dir, "cpu")
        self.engines.append(weakref.ref(engine))
        return RankService(engine, Telemetry())

    def retire(self, service: RankService) -> None:
        self.retired.append(service.engine.manifest.model_version)

    def alive(self) -> int:
        gc.collect()
        return sum(engine() is not None for engine in self.engines)


def relabelled(source: Path, target: Path, version: str, name: str = "small") -> Path:
    """A copy of a bundle under another name and version, put into place as a whole."""
    temporary = target.parent / f".{target.name}.tmp"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary)
    manifest = Manifest.read(temporary).model_copy(update={"model_version": version, "model_name": name})
    manifest.write(temporary)
    temporary.rename(target)
    return target


@pytest.fixture
def root(bundle_dir: Path, tmp_path: Path) -> Path:
    relabelled(bundle_dir, tmp_path / "models" / "small" / "1", "1")
    return tmp_path / "models"


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def registry(root: Path, maker: Maker) -> Iterator[ModelRegistry]:
    """A registry that looks when it is told to, and hardly ever by itself."""
    made = ModelRegistry(DirectoryStore(root), maker, RegistryConfig(poll_s=3600, drain_s=5))
    made.start()
    yield made
    made.close()


def served(registry: ModelRegistry, version: str = "", key: str = "") -> str:
    with registry.lease("small", version, key) as service:
        return service.engine.manifest.model_version


def policy(root: Path, text: str) -> None:
    (root / "small" / "policy.yaml").write_text(text)


def settled(condition: Callable[[], bool]) -> bool:
    due = time.monotonic() + 20
    while time.monotonic() < due:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_the_newest_version_answers_and_the_old_one_drains(root: Path, bundle_dir: Path, registry: ModelRegistry, maker: Maker) -> None:
    assert served(registry) == "1"
    relabelled(bundle_dir, root / "small" / "10", "10")
    relabelled(bundle_dir, root / "small" / "9", "9")
    with registry.lease("small", "") as held:
        registry.look()
        assert served(registry) == "10"
        assert {(state.version, state.state) for state in registry.models()} == {("10", "READY"), ("1", "DRAINING")}
        assert held.engine.manifest.model_version == "1"
        assert maker.retired == []
    assert settled(lambda: maker.retired == ["1"])
    del held
    assert settled(lambda: maker.alive() == 1)
    with pytest.raises(UnknownModelError, match="version '9' is not served here; served: 10"):
        registry.lease("small", "9")
    with pytest.raises(UnknownModelError, match="model 'smal' is not served here; served: small"):
        registry.lease("smal", "")


def corrupt(path: Path, how: str) -> None:
    if how == "table":
        file = next((path / "tables").iterdir())
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    elif how == "missing":
        (path / "spec.json").unlink()
    elif how == "manifest":
        (path / "manifest.json").write_text("{}")
    elif how == "golden":
        # Whole by its checksums, and yet not the model that it says it is.
        manifest = Manifest.read(path)
        from safetensors.torch import load_file, save_file

        from ninerank.predictor.manifest import hash_file

        weights = load_file(path / "weights.safetensors")
        save_file({name: value + 0.5 for name, value in weights.items()}, path / "weights.safetensors")
        files = {**manifest.files, "weights.safetensors": hash_file(path / "weights.safetensors")}
        manifest.model_copy(update={"files": files}).write(path)
    elif how == "name":
        Manifest.read(path).model_copy(update={"model_version": "other"}).write(path)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("table", "is corrupt, SHA-256"),
        ("missing", "is missing from the bundle"),
        ("manifest", "has bundle format None"),
        ("golden", "differ by"),
        ("name", "holds small other"),
    ],
)
def test_a_bad_version_is_refused_and_the_old_one_goes_on(
    root: Path, bundle_dir: Path, registry: ModelRegistry, how: str, said: str
) -> None:
    corrupt(relabelled(bundle_dir, root / "small" / "2", "2"), how)
    registry.look()
    registry.look()
    assert served(registry) == "1"
    (failed,) = [state for state in registry.models() if state.state == "FAILED"]
    assert failed.version == "2"
    assert said in failed.reason
    with pytest.raises(BundleError, match=said):
        registry.load("small", "2")
    assert served(registry) == "1"
    shutil.rmtree(root / "small" / "2")
    relabelled(bundle_dir, root / "small" / "2", "2")
    registry.look()
    assert served(registry) == "2"


def test_commands_go_back_and_forth(root: Path, bundle_dir: Path, registry: ModelRegistry) -> None:
    relabelled(bundle_dir, root / "small" / "2", "2")
    registry.look()
    assert registry.load("small", "1").version == "1"
    registry.look()
    assert served(registry) == "1", "what a command says stays"
    assert registry.load("", "").version == "2"
    assert registry.unload("small", "2").state == "DRAINING"
    assert served(registry) == "1"
    registry.look()
    assert served(registry) == "1", "what was taken out stays out"
    assert registry.load("small", "2").version == "2"
    with pytest.raises(UnknownModelError, match="version '3' of small is not in the store; there are: 1, 2"):
        registry.load("small", "3")
    with pytest.raises(UnknownModelError, match="model 'large' is not in the store; there are: small"):
        registry.load("large", "")
    registry.unload("small", "")
    registry.unload("small", "")
    with pytest.raises(UnknownModelError, match="served: none"):
        served(registry)


def test_policies_say_who_answers(root: Path, bundle_dir: Path, registry: ModelRegistry) -> None:
    for version in ("2", "3"):
        relabelled(bundle_dir, root / "small" / version, version)
    policy(root, "{kind: pinned, version: '2'}")
    registry.look()
    assert {state.version for state in registry.models() if state.state == "READY"} == {"2"}
    policy(root, "{kind: canary, version: '3', percent: 25, stable: '1'}")
    registry.look()
    arms = {f"user{n}": served(registry, key=f"user{n}") for n in range(400)}
    assert set(arms.values()) == {"1", "3"}
    assert 60 <= list(arms.values()).count("3") <= 140
    assert all(served(registry, key=key) == arm for key, arm in arms.items()), "a session keeps its arm"
    assert served(registry, version="3") == "3"
    policy(root, "{kind: shadow, version: '3', percent: 50}")
    registry.look()
    assert {served(registry, key=f"user{n}") for n in range(50)} == {"2"}
    heard = [registry.shadow("small", f"user{n}") for n in range(200)]
    assert 60 <= sum(own is not None for own in heard) <= 140
    assert {own.manifest.model_version for own in heard if own is not None} == {"3"}
    policy(root, "{kind: canari, version: '3'}")
    registry.look()
    assert heard == [registry.shadow("small", f"user{n}") for n in range(200)], "a wrong file changes nothing"
    policy(root, "{kind: canary, version: '99', percent: 100}")
    registry.look()
    assert served(registry, key="any") == "3", "a trial that is not there gets nobody"
    (root / "small" / "policy.yaml").unlink()
    registry.look()
    assert served(registry) == "3"


def test_shares_are_as_large_as_they_say() -> None:
    keys = [f"k{n}" for n in range(20_000)]
    for percent in (0.0, 1.0, 37.5, 100.0):
        share = np.mean([in_share(key, percent, "salt") for key in keys])
        assert abs(share - percent / 100) < 0.01
    assert [in_share(key, 50, "a") for key in keys] != [in_share(key, 50, "b") for key in keys]


def test_several_models_are_told_apart(root: Path, bundle_dir: Path, registry: ModelRegistry) -> None:
    relabelled(bundle_dir, root / "large" / "5", "5", name="large")
    registry.look()
    with registry.lease("large", "") as service:
        assert service.engine.manifest.model_name == "large"
    with pytest.raises(UnknownModelError, match="several models are served, the call names none; served: small, large"):
        registry.lease("", "")
    shutil.rmtree(root / "large")
    registry.look()
    with registry.lease("large", ""):
        pass  # gone from the store: whoever answers goes on


def test_a_registry_without_a_model_says_why(tmp_path: Path, bundle_dir: Path) -> None:
    with pytest.raises(BundleError, match="no model can be served: the store holds no bundle"):
        ModelRegistry(DirectoryStore(tmp_path), Maker()).start()
    corrupt(relabelled(bundle_dir, tmp_path / "small" / "2", "2"), "missing")
    with pytest.raises(BundleError, match=r"no model can be served: small 2: .*is missing from the bundle"):
        ModelRegistry(DirectoryStore(tmp_path), Maker()).start()
    with pytest.raises(BundleError, match="is no directory of models"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="needs a local folder"):
        open_store("s3://bucket/models")


def test_versions_rise_by_the_numbers_in_them() -> None:
    mixed = ["v10", "10", "2026-01-10.1", "1", "v2", "2026-01-02.3", "2"]
    assert sorted(mixed, key=version_order) == ["1", "2", "10", "2026-01-02.3", "2026-01-10.1", "v2", "v10"]


def test_an_object_store_is_copied_and_never_out_of_its_folder(root: Path, bundle_dir: Path, tmp_path: Path) -> None:
    store = ObjectStore(root.as_uri(), tmp_path / "local")
    assert store.models() == ["small"]
    copied = store.fetch("small", "1")
    assert copied.is_relative_to(tmp_path / "local")
    Engine.load(copied, "cpu")
    assert store.fetch("small", "1") == copied
    policy(root, "{kind: latest}")
    found = store.policy("small")
    assert found is not None
    assert found.is_relative_to(tmp_path / "local")
    manifest = json.loads((root / "small" / "1" / "manifest.json").read_text())
    path = relabelled(bundle_dir, root / "small" / "2", "2")
    bad = Manifest.read(path)
    files = {**bad.files, "../../escaped.txt": next(iter(bad.files.values()))}
    bad.model_copy(update={"files": files}).write(path)
    with pytest.raises(BundleError, match="no path of a file inside a bundle"):
        store.fetch("small", "2")
    assert not (tmp_path / "local" / "escaped.txt").exists()
    assert not [name for name in (tmp_path / "local" / "small").iterdir() if name.name.startswith("2")]
    assert manifest["model_version"] == "1"


class Calls:
    """Threads that lease and score without a pause, and what they saw."""

    def __init__(self, registry: ModelRegistry, request: RankInput, threads: int = 2) -> None:
        self.registry, self.request = registry, request
        self.seen: set[tuple[str, bytes]] = set()
        self.errors: list[Exception] = []
        self.count = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with self.registry.lease("small", "") as service:
                    scores = service.engine.rank(self.request).scores_NT
                    self.seen.add((service.engine.manifest.model_version, scores.tobytes()))
                self.count += 1
            except Exception as error:  # noqa: BLE001
                self.errors.append(error)

    def __enter__(self) -> "Calls":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("swaps", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_swaps_under_calls_fail_none_and_leak_nothing(
    root: Path, bundle_dir: Path, registry: ModelRegistry, maker: Maker, log_rows: Rows, swaps: int
) -> None:
    """Every third version that is offered is corrupt."""
    rows = log_rows(20, seed=2)
    with registry.lease("small", "") as service:
        request = service.engine.schema.rank_input(
            rows.select(service.engine.schema.request.names).slice(0, 1), rows.select(service.engine.schema.item.names)
        )
    del service
    with Calls(registry, request) as calls:
        for n in range(2, swaps + 2):
            path = relabelled(bundle_dir, root / "small" / str(n), str(n))
            if n % 3 == 0:
                corrupt(path, ("table", "missing", "manifest")[n // 3 % 3])
            registry.look()
            assert served(registry) == (str(n) if n % 3 else str(n - 1))
            for old in (root / "small").iterdir():
                if old.name not in {str(n), str(n - 1)}:
                    shutil.rmtree(old)
    assert calls.errors == []
    assert calls.count > swaps
    assert len({scores for _, scores in calls.seen}) == 1
    assert settled(lambda: maker.alive() == 1)
    assert threading.active_count() < 20


class Trained:
    """A model whose tables change, its bundle, and the deltas it publishes."""

    def __init__(self, model: RankingModel, spec: FeatureSpec, root: Path, golden: pa.RecordBatch, tables: str) -> None:
        self.model, self.spec, self.root, self.golden, self.tables = model, spec, root, golden, tables
        self.collection = model.embedding
        groups = dict(self.collection.named_groups())
        self.tracker = StaticTracker(self.collection.layout, {f"value.{name}": group.storage for name, group in groups.items()})
        self.rng = np.random.default_rng(0)
        self.export(root / "small" / "1", "1")
        self.directory = root / "small" / "1.deltas"
        self.directory.mkdir()
        self.writer = DeltaWriter(self.directory, self.tracker.sources())
        self.writer.base("1")

    def export(self, path: Path, version: str) -> Path:
        export_bundle(self.model, self.spec, self.golden, path, model_name="small", version=version, tables=self.tables)
        return path

    def rows(self) -> list[torch.Tensor]:
        return [group.storage.detach().clone() for _, group in self.collection.named_groups()]

    def put(self, rows: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for (_, group), own in zip(self.collection.named_groups(), rows, strict=True):
                group.storage.copy_(own)

    def train(self) -> Path:
        """Change some rows and publish them."""
        rows = torch.from_numpy(np.unique(self.rng.integers(1, self.collection.layout.total_rows, 40)))
        with torch.no_grad():
            for _, group in self.collection.named_groups():
                group.storage[rows] += torch.randn(len(rows), group.dim)
        self.tracker.mark(rows)
        return self.writer.delta()


@pytest.mark.parametrize(
    ("tables", "deltas"), [("int8", 2), *(pytest.param(name, 4, marks=pytest.mark.slow) for name in ("fp32", "fp16", "int8", "int4"))]
)
def test_deltas_reach_a_live_model_and_equal_a_full_export_bit_for_bit(
    model: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path, tables: str, deltas: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        collection = EmbeddingCollection(spec, {"deep": 4, "linear": 1}, EmbeddingConfig(init_std=0.05), seed=2)
        trained = Trained(RankingModel(collection, model.tower).eval(), spec, tmp_path / "models", log_rows(16, seed=1), tables)
        maker = Maker()
        registry = ModelRegistry(DirectoryStore(tmp_path / "models"), maker, RegistryConfig(poll_s=0.05, drain_s=5))
        registry.start()
        rows = log_rows(30, seed=4)
        with registry.lease("small", "") as service:
            schema = service.engine.schema
        request = schema.rank_input(rows.select(schema.request.names).slice(0, 1), rows.select(schema.item.names))
        wanted = {Engine.load(tmp_path / "models" / "small" / "1", "cpu").rank(request).scores_NT.tobytes()}
        try:
            live, kept = [], []
            with Calls(registry, request) as calls:
                for n in range(1, deltas + 1):
                    trained.train()
                    kept.append(trained.rows())
                    assert settled(lambda n=n: [state.sequence for state in registry.models() if state.state == "READY"] == [n])
                    with registry.lease("small", "") as service:
                        live.append((service.engine.rank(request).scores_NT, service.engine.score(rows)))
            for n, (of_request, of_rows) in enumerate(live):
                trained.put(kept[n])
                full = Engine.load(trained.export(tmp_path / f"full{n}", "1"), "cpu")
                assert np.array_equal(of_request, full.rank(request).scores_NT)
                assert np.array_equal(of_rows, full.score(rows))
                wanted.add(full.rank(request).scores_NT.tobytes())
            assert calls.errors == []
            assert {scores for _, scores in calls.seen} <= wanted, "no call saw half a delta"
            assert maker.retired == [], "the version goes on"
        finally:
            registry.close()
        assert maker.retired == ["1"]


def test_a_delta_that_does_not_follow_leaves_the_rows_as_they_are(
    model: RankingModel, spec: FeatureSpec, log_rows: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        collection = EmbeddingCollection(spec, {"deep": 4, "linear": 1}, EmbeddingConfig(init_std=0.05), seed=2)
        trained = Trained(RankingModel(collection, model.tower).eval(), spec, tmp_path / "models", log_rows(16, seed=1), "fp32")
        told: list[ModelState] = []
        registry = ModelRegistry(DirectoryStore(tmp_path / "models"), Maker(), RegistryConfig(poll_s=3600), told.append)
        registry.start()
        try:
            first = trained.train()
            file = next(path for path in first.iterdir() if path.name.endswith("rows.arrow"))
            whole = file.read_bytes()
            file.write_bytes(whole[:-8])
            registry.look()
            registry.look()
            assert [state.sequence for state in registry.models()] == [0]
            assert sum("a delta is not applied" in message for message in caplog.messages) == 1
            file.write_bytes(whole)
            trained.train()
            registry.look()
            assert [state.sequence for state in registry.models() if state.state == "READY"] == [2]
            assert [state.sequence for state in told] == [0, 2]
        finally:
            registry.close()


def test_a_server_of_a_folder_swaps_versions_logs_them_apart_and_tells(
    root: Path, bundle_dir: Path, log_rows: Rows, tmp_path: Path
) -> None:
    server = PredictorServer(root, ServeConfig(port=0, device="cpu", poll_s=0.05, log_dir=tmp_path / "log", metrics_port=0))
    ready = server.start()
    rows = log_rows(3, seed=1)
    schema = server.engine.schema
    user = {name: rows.column(name)[0].as_py() for name in schema.request.names}
    items = {name: rows.column(name) for name in schema.item.names}
    try:
        with PredictorClient(f"127.0.0.1:{ready.port}") as client:
            assert client.rank(user, items).model_version == "1"
            relabelled(bundle_dir, root / "small" / "2", "2")
            assert settled(lambda: client.rank(user, items).model_version == "2")
            policy(root, "{kind: shadow, version: '2', percent: 100}")
            assert settled(lambda: client.rank(user, items).model_version == "1")
            for n in range(5):
                assert client.rank(user, items, request_id=f"both{n}").model_version == "1"
            assert settled(lambda: server.assembly.logs()[0].stats().dropped == 0 and not server.front._unheard)
            with urllib.request.urlopen(f"http://127.0.0.1:{ready.metrics_port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        assert 'ninerank_model_versions{name="small",state="READY"} 2.0' in text
        assert 'ninerank_model_info{name="small",spec_digest=' in text
        assert "ninerank_queue_depth 0.0" in text
    finally:
        server.stop(5)
    logged = {version: {r.request_id for r in read_log(tmp_path / "log" / "small" / version)} for version in ("1", "2")}
    both = {f"both{n}" for n in range(5)}
    assert both <= logged["1"]
    assert both <= logged["2"], "scored, logged, never returned"
