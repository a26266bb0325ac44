"""Dynamic tables in a collection: the same numbers as static tables that hold the same rows, and the optimizer over both."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.optimizer import SparseOptimizer, SparseOptimizerConfig, clip_grad_norm_
from ninerank.errors import CheckpointError, DataError, SpecError
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import MISSING_ID, Dynamic, FeatureSpec, IdFeature
from ninerank.towers.sides import joined

MakeBatch = Callable[..., Batch]
GROUPS = {"deep": 4, "linear": 1}
DYNAMIC = ("item", "tags", "hour")


def with_dynamic(spec: FeatureSpec) -> FeatureSpec:
    """The spec with some tables turned dynamic: singles on both sides, bags and sequences look into them."""
    features = tuple(
        f.model_copy(update={"encoding": Dynamic()}) if isinstance(f, IdFeature) and f.table_name in DYNAMIC else f for f in spec.features
    )
    return spec.model_copy(update={"features": features})


def raw(spec: FeatureSpec, batch: Batch) -> Batch:
    """The batch with raw ids for dynamic tables: id k of a static table is raw id 2^62 - 977 k, row 0 is missing."""

    def turned(ids: KeyedJagged) -> KeyedJagged:
        values, spans = ids.values.clone(), ids.spans()
        for key in ids.keys:
            if spec.table_of(key) in DYNAMIC:
                own = values[spans[key]]
                values[spans[key]] = torch.where(own == 0, MISSING_ID, 2**62 - 977 * own)
        return replace(ids, values=values)

    def block(part: Block) -> Block:
        return replace(part, single=turned(part.single), bags=turned(part.bags), sequences=turned(part.sequences))

    return replace(batch, request=block(batch.request), item=block(batch.item))


def pair(spec: FeatureSpec) -> tuple[EmbeddingCollection, EmbeddingCollection]:
    """A static collection, and one with dynamic tables that start from the same rows; row 0 is zeros in both."""
    config = EmbeddingConfig(init_std=0.3)
    static, dynamic = EmbeddingCollection(spec, GROUPS, config, seed=0), EmbeddingCollection(with_dynamic(spec), GROUPS, config, seed=0)
    for name, group in static.named_groups():
        for table, rows in group.layout.items():
            if table in DYNAMIC:
                group.storage.data[rows.start] = 0.0
            else:
                dict(dynamic.named_groups())[name].table(table).copy_(group.table(table))
    for table in DYNAMIC:
        ids = 2**62 - 977 * torch.arange(static.layout.num_rows[static.layout.names.index(table)] - 1, 0, -1)
        values = {f"value.{name}": group.table(table)[1:].flip(0).clone() for name, group in static.named_groups()}
        dynamic.managed[table].load_values({"id": ids, **values})
    return static, dynamic


def loss_of(out: dict[str, Tensor]) -> Tensor:
    values = [value for _, value in sorted(out.items()) if value.is_floating_point()]
    return torch.stack([(value.cos() * (i + 1)).sum() for i, value in enumerate(values)]).sum()


@pytest.mark.parametrize("requests", [None, 3])
def test_reads_what_a_static_table_of_the_same_rows_reads(spec: FeatureSpec, make_batch: MakeBatch, requests: int | None) -> None:
    static, dynamic = pair(spec)
    batch = make_batch(spec, 7, requests=requests, seed=3)
    want, got = static(batch), dynamic(raw(spec, batch))
    assert want.keys() == got.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl"])
def test_trains_as_static_tables_do(spec: FeatureSpec, make_batch: MakeBatch, kind: str) -> None:
    """Same updates for both kinds of table, with a clip that acts, for every rule; the default row stays zero in dynamic tables."""
    static, dynamic = pair(spec)
    config = SparseOptimizerConfig.parse({"kind": kind, "lr": 0.05, "table_lr": {"item": 0.1, "user": 0.02}}, "optimizer")
    optimizers = SparseOptimizer(static, config), SparseOptimizer(dynamic, config)
    for step in range(4):
        batch = make_batch(spec, 6, seed=step)
        prepared = dynamic.prepare(raw(spec, batch), step=step)
        norms = []
        for collection, own, optimizer in ((static, batch, optimizers[0]), (dynamic, prepared, optimizers[1])):
            optimizer.zero_grad()
            loss_of(collection(own)).backward()
            if collection is static:
                zero_default_gradients(static)
            norms.append(float(clip_grad_norm_([], optimizer, 1.0)))
            optimizer.step()
        dynamic.finish_step(step)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert norms[0] > 1.0
    for name, group in static.named_groups():
        for table in group.layout.names:
            if table in DYNAMIC:
                got = dynamic.managed[table].values_state()[f"value.{name}"].flip(0)
                torch.testing.assert_close(got, group.table(table)[1:], rtol=1e-5, atol=1e-6)
            else:
                torch.testing.assert_close(dict(dynamic.named_groups())[name].table(table), group.table(table), rtol=1e-5, atol=1e-6)


def zero_default_gradients(collection: EmbeddingCollection) -> None:
    """Static tables train row 0, dynamic ones do not: drop its gradient, so that both can be compared."""
    first = torch.tensor([collection.layout.rows_of(table).start for table in DYNAMIC])
    for _, group in collection.named_groups():
        summed = group.gradients.coalesced(collection.layout.total_rows)
        if summed is not None:
            summed.grad_GD[torch.isin(summed.rows_N.long(), first)] = 0.0


def test_state_dict_and_optimizer_state_go_on_bit_for_bit(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    def made() -> tuple[EmbeddingCollection, SparseOptimizer]:
        collection = EmbeddingCollection(with_dynamic(spec), GROUPS, EmbeddingConfig(init_std=0.3), seed=0)
        return collection, SparseOptimizer(collection, SparseOptimizerConfig(kind="adam", lr=0.05))

    def train(collection: EmbeddingCollection, optimizer: SparseOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(collection(collection.prepare(raw(spec, make_batch(spec, 6, seed=step)), step=step))).backward()
            optimizer.step()
            collection.finish_step(step)

    whole, half, resumed = made(), made(), made()
    train(*whole, range(4))
    train(*half, range(2))
    resumed[0].load_state_dict(half[0].state_dict())
    resumed[1].load_state_dict(half[1].state_dict())
    for name, table in resumed[0].managed.items():
        table.load_state(half[0].managed[name].state())
    train(*resumed, range(2, 4))
    for one, other in zip(whole, resumed, strict=True):
        want, got = one.state_dict(), other.state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(got[key], value) for key, value in want.items())
    assert whole[0].table_metrics()["table.item.size"] == len(whole[0].managed["item"].values_state()["id"]) > 0
    copied = EmbeddingCollection(with_dynamic(spec), GROUPS, EmbeddingConfig(), seed=5)
    copied.load_state_dict(whole[0].state_dict())
    batch = raw(spec, make_batch(spec, 6, seed=1))
    assert all(torch.equal(value, whole[0](batch)[key]) for key, value in copied(batch).items())
    assert copied.num_values == whole[0].num_values


def test_wrong_use_is_refused(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    own = with_dynamic(spec)
    with pytest.raises(SpecError, match="need embedding mode 'sparse'"):
        EmbeddingCollection(own, GROUPS, EmbeddingConfig(mode="dense"), seed=0)
    with pytest.raises(SpecError, match="embedding.tables: 'itm' is no dynamic table of the spec; did you mean 'item'"):
        EmbeddingCollection(own, GROUPS, EmbeddingConfig.parse({"tables": {"itm": {}}}, "embedding"), seed=0)
    collection = EmbeddingCollection(own, GROUPS, EmbeddingConfig(), seed=0)
    with pytest.raises(DataError, match="prepare"):
        collection(raw(spec, make_batch(spec, 3)).to(torch.device("meta")))
    with pytest.raises(CheckpointError, match="'value.linear' is missing"):
        collection.managed["item"].load_values({"id": torch.tensor([1]), "value.deep": torch.zeros(1, 4)})
    with pytest.raises(RuntimeError, match="dynamic table 'item'"):
        collection.load_state_dict({key: value for key, value in collection.state_dict().items() if "managed.item" not in key})
    with pytest.raises(SpecError, match="were not given"):
        EmbeddingCollection.of_tables(own, {"deep": torch.zeros(collection.layout.total_rows, 4)}, EmbeddingConfig())


def test_settings_of_single_tables_and_of_all(spec: FeatureSpec) -> None:
    dynamic = {"admission": {"kind": "frequency", "threshold": 3}}
    config = EmbeddingConfig.parse({"init_std": 0.5, "dynamic": dynamic, "tables": {"item": {"init_std": 0.1}}}, "embedding")
    assert config.dynamic_table("tags").admission.kind == "frequency"
    assert config.dynamic_table("tags").init_std == 0.5
    assert config.dynamic_table("item").admission.kind == "always"
    assert config.dynamic_table("item").init_std == 0.1


@pytest.mark.parametrize("requests", [None, 1, 3])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_sides_joined_again_are_the_inputs(spec: FeatureSpec, make_batch: MakeBatch, requests: int | None, is_dynamic: bool) -> None:
    collection = pair(spec)[is_dynamic]
    batch = make_batch(spec, 7, requests=requests, seed=3)
    batch = raw(spec, batch) if is_dynamic else batch
    want, sides = collection(batch), collection.sides(batch)
    assert sides["deep.request"].shape[0] == (requests or 7)
    got = joined(sides, ["deep", "linear"], spec.sequence_keys("request"))
    assert want.keys() == got.keys()
    for key, value in want.items():
        shorter = min(value.shape[1], got[key].shape[1])
        assert torch.equal(got[key][:, :shorter], value[:, :shorter])
