from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.optimizer import SparseOptimizer, SparseOptimizerConfig, clip_grad_norm_, sparse_optimizer
from ninerank.errors import CheckpointError, SpecError
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec

MakeBatch = Callable[..., Batch]
GROUPS = {"deep": 4, "linear": 1}


def collection_of(spec: FeatureSpec, mode: str = "sparse") -> EmbeddingCollection:
    return EmbeddingCollection(spec, GROUPS, EmbeddingConfig.parse({"mode": mode, "init_std": 0.3}, "embedding"), seed=0)


def loss_of(collection: EmbeddingCollection, batch: Batch) -> Tensor:
    values = [value for _, value in sorted(collection(batch).items()) if value.is_floating_point()]
    return torch.stack([(value.cos() * (i + 1)).sum() for i, value in enumerate(values)]).sum()


def optimizer_of(collection: EmbeddingCollection, **config: object) -> SparseOptimizer:
    return sparse_optimizer(collection, SparseOptimizerConfig.parse(config, "optimizer"))


def train(spec: FeatureSpec, make_batch: MakeBatch, steps: int, **config: object) -> tuple[EmbeddingCollection, SparseOptimizer]:
    collection = collection_of(spec)
    optimizer = optimizer_of(collection, **config)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(collection, make_batch(spec, 8, seed=step)).backward()
        optimizer.step()
    return collection, optimizer


@pytest.mark.parametrize(
    ("config", "rival"),
    [
        ({"kind": "sgd", "lr": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ({"kind": "adagrad", "lr": 0.1, "eps": 1e-8}, lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
        (
            {"kind": "adagrad", "lr": 0.1, "eps": 1e-3, "initial_accumulator": 0.5},
            lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3, initial_accumulator_value=0.5),
        ),
    ],
)
def test_equals_torch_optim_on_dense_tables(
    spec: FeatureSpec, make_batch: MakeBatch, config: dict[str, object], rival: Callable[..., torch.optim.Optimizer]
) -> None:
    collection, _ = train(spec, make_batch, 5, **config)
    dense = collection_of(spec, "dense")
    optimizer = rival(dense.parameters())
    for step in range(5):
        optimizer.zero_grad()
        loss_of(dense, make_batch(spec, 8, seed=step)).backward()
        optimizer.step()
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(collection.state_dict()[key], value, atol=2e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["sgd", "adagrad", "rowwise_adagrad"]),
    decay=st.sampled_from([0.0, 0.1]),
    start=st.sampled_from([0.0, 0.2]),
    scale=st.sampled_from([1.0, 0.25]),
    table_lr=st.sampled_from([{}, {"item": 0.5}, {"user": 0.01, "tags": 1.0}]),
    seed=st.integers(0, 99),
)
def test_follows_the_stated_formula_row_by_row(
    spec: FeatureSpec, make_batch: MakeBatch, kind: str, decay: float, start: float, scale: float, table_lr: dict[str, float], seed: int
) -> None:
    """Float64, one row at a time; rows that no id names keep their bits."""
    collection, dense = collection_of(spec), collection_of(spec, "dense")
    config: dict[str, object] = {"kind": kind, "lr": 0.1, "weight_decay": decay, "table_lr": table_lr}
    if kind != "sgd":
        config |= {"eps": 1e-2, "initial_accumulator": start}
    optimizer = optimizer_of(collection, **config)
    optimizer.lr_scale = scale
    want = {key: value.double().clone() for key, value in dense.state_dict().items()}
    state = {key: torch.full_like(value, start) for key, value in want.items()}
    for step in range(2):
        batch = make_batch(spec, 5, seed=seed + step)
        dense.load_state_dict(want)
        dense.zero_grad()
        loss_of(dense, batch).backward()
        optimizer.zero_grad()
        loss_of(collection, batch).backward()
        touched = {name: set(rows.tolist()) for name, (rows, _) in optimizer.gradients().items()}
        optimizer.step()
        for name, group in dense.named_groups():
            assert group.storage.grad is not None
            for table, rows in group.layout.items():
                key, lr = f"groups.{name}.{table}", scale * table_lr.get(table, 0.1)
                for row in range(rows.start, rows.stop):
                    if row not in touched[name]:
                        assert not group.storage.grad[row].any()
                        continue
                    w, s = want[key][row - rows.start], state[key][row - rows.start]
                    g = group.storage.grad[row].double() + decay * w
                    if kind == "sgd":
                        w -= lr * g
                        continue
                    s += g * g if kind == "adagrad" else (g * g).mean()
                    w -= lr * g / (s.sqrt() + 1e-2)  # eps: a gradient near 0 would turn rounding into steps
    got = collection.state_dict()
    for key, value in want.items():
        torch.testing.assert_close(got[key].double(), value, atol=5e-6, rtol=1e-5)


def test_untouched_rows_keep_their_bits(narrow_spec: FeatureSpec, make_batch: MakeBatch) -> None:
    before = collection_of(narrow_spec).state_dict()["groups.deep.c"]
    collection, _ = train(narrow_spec, make_batch, 1, kind="rowwise_adagrad", weight_decay=0.5)
    ids = make_batch(narrow_spec, 8, seed=0).item.single["c"].values
    kept = torch.ones(len(before), dtype=torch.bool).index_fill(0, ids, False)
    after = collection.state_dict()["groups.deep.c"]
    assert torch.equal(after[kept], before[kept])
    assert (after[~kept] != before[~kept]).any(1).all()


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
def test_training_twice_gives_the_same_bits(spec: FeatureSpec, make_batch: MakeBatch, kind: str) -> None:
    (one, a), (two, b) = (train(spec, make_batch, 4, kind=kind) for _ in range(2))
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key])


def test_several_forward_passes_before_a_step_add_up(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batches = [make_batch(spec, 6, seed=seed) for seed in (1, 2)]
    apart, joint = collection_of(spec), collection_of(spec)
    for batch in batches:
        loss_of(apart, batch).backward()
    torch.stack([loss_of(joint, batch) for batch in batches]).sum().backward()
    loss_of(joint, batches[0])  # a forward without backward leaves nothing
    for collection in (apart, joint):
        optimizer_of(collection, kind="adagrad").step()
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(joint.state_dict()[key], value)


def test_norm_and_clipping_see_summed_gradients_of_both_kinds(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batch = make_batch(spec, 6)
    sparse, dense = collection_of(spec), collection_of(spec, "dense")
    extra = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for collection, parameter in zip((sparse, dense), extra, strict=True):
        (loss_of(collection, batch) + 5 * parameter.sum()).backward()
    optimizer = optimizer_of(sparse, kind="sgd", lr=1.0)
    want = torch.nn.utils.clip_grad_norm_([*dense.parameters(), extra[1]], 2.0)
    assert float(clip_grad_norm_([extra[0]], optimizer, 2.0)) == pytest.approx(float(want), rel=1e-6)
    torch.testing.assert_close(extra[0].grad, extra[1].grad)
    assert float(torch.cat([optimizer.grad_norm()[None], extra[0].grad]).norm()) == pytest.approx(2.0, rel=1e-4)  # type: ignore[list-item]
    for name, group in dense.named_groups():
        row_K, grad_KD = optimizer.gradients()[name]
        assert group.storage.grad is not None
        torch.testing.assert_close(grad_KD, group.storage.grad[row_K], atol=1e-6, rtol=1e-5)
    before = optimizer.grad_norm()
    clip_grad_norm_([extra[0]], optimizer, 100.0)
    assert torch.equal(optimizer.grad_norm(), before)


def test_nothing_touched_is_a_norm_of_zero_and_a_step_without_effect(spec: FeatureSpec) -> None:
    collection = collection_of(spec)
    optimizer = optimizer_of(collection)
    before = {key: value.clone() for key, value in collection.state_dict().items()}
    assert float(clip_grad_norm_([], optimizer, 1.0)) == 0.0
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in collection.state_dict().items())
    assert float(clip_grad_norm_([], None, 1.0)) == 0.0


@pytest.mark.parametrize("kind", ["adagrad", "rowwise_adagrad", "sgd"])
def test_state_resumes_bit_for_bit_in_another_table_order(spec: FeatureSpec, make_batch: MakeBatch, kind: str) -> None:
    whole, _ = train(spec, make_batch, 4, kind=kind)
    half, optimizer = train(spec, make_batch, 2, kind=kind)
    turned = spec.model_copy(update={"features": tuple(sorted(spec.features, key=lambda f: f.name != "item"))})
    assert tuple(turned.tables) != tuple(spec.tables)
    resumed = collection_of(turned)
    resumed.load_state_dict(half.state_dict())
    again = optimizer_of(resumed, kind=kind)
    again.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    same_order = collection_of(spec)
    same_order.load_state_dict(half.state_dict())
    further = optimizer_of(same_order, kind=kind)
    further.load_state_dict(optimizer.state_dict())
    for step in (2, 3):
        further.zero_grad()
        loss_of(same_order, make_batch(spec, 8, seed=step)).backward()
        further.step()
    for key, value in whole.state_dict().items():
        assert torch.equal(same_order.state_dict()[key], value)


def test_state_that_does_not_fit_is_refused_and_changes_nothing(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    _, optimizer = train(spec, make_batch, 1, kind="adagrad")
    before = {key: value.clone() for key, value in optimizer.state_dict().items()}
    good = {key: value + 1 for key, value in before.items()}
    with pytest.raises(CheckpointError, match=r"'deep.item.sum' has shape \(2, 4\), \(31, 4\) is needed"):
        optimizer.load_state_dict({**good, "deep.item.sum": torch.zeros(2, 4)})
    with pytest.raises(CheckpointError, match=r"'deep.nobody.sum' is not of this optimizer \(adagrad\)"):
        optimizer.load_state_dict({**good, "deep.nobody.sum": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="is missing"):
        optimizer.load_state_dict({})
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state_dict().items())


def test_wrong_settings_are_refused(spec: FeatureSpec) -> None:
    with pytest.raises(SpecError, match="needs embedding mode 'sparse'"):
        optimizer_of(collection_of(spec, "dense"))
    with pytest.raises(SpecError, match="unknown table 'itm'; did you mean 'item'"):
        optimizer_of(collection_of(spec), table_lr={"itm": 0.1})
    with pytest.raises(SpecError, match="item = nan"):
        optimizer_of(collection_of(spec), table_lr={"item": float("nan")})
    wrong = ({"lr": 0.0}, {"lr": float("inf")}, {"kind": "adamw"}, {"eps": 0.0}, {"weight_decay": -1.0}, {"learning_rate": 1.0})
    for bad in (*wrong, {"table_lr": 1}, {"beta2": 1.0}):
        with pytest.raises(SpecError):
            SparseOptimizerConfig.parse(bad, "optimizer")
    with pytest.raises(SpecError, match="'eps' is no setting of sgd, which takes lr, table_lr, max_gradient"):
        SparseOptimizerConfig.parse({"kind": "sgd", "eps": 0.1}, "optimizer")
