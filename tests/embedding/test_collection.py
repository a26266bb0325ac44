from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig, pooled_keys
from ninerank.embedding.quantize import TableDtype, quantize
from ninerank.errors import DataError, SpecError
from ninerank.features.batch import Batch, Block, KeyedJagged
from ninerank.features.spec import FeatureSpec, IdFeature, Vocabulary

MakeBatch = Callable[..., Batch]
GROUPS = {"deep": 5, "linear": 2}


def collection_of(spec: FeatureSpec, mode: str = "sparse", groups: Mapping[str, int] = GROUPS, **config: object) -> EmbeddingCollection:
    return EmbeddingCollection(spec, groups, EmbeddingConfig.parse({"mode": mode, "init_std": 0.5, **config}, "embedding"), seed=3)


def naive(spec: FeatureSpec, collection: EmbeddingCollection, batch: Batch, group: str) -> dict[str, Tensor]:
    """Row by row, feature by feature, in float64, from the tables' own views."""
    table_group = dict(collection.named_groups())[group]
    dim = table_group.dim

    def row_of(side_row: int, side: str) -> int:
        return side_row if side == "item" or batch.user_row_B is None else int(batch.user_row_B[side_row])

    def vectors(block_part: KeyedJagged, key: str, row: int) -> Tensor:
        jagged = block_part[key]
        ids = jagged.values[jagged.offsets[row] : jagged.offsets[row + 1]]
        return torch.stack([torch.zeros(dim).double(), *(table_group.table(str(spec.table_of(key)))[i].double() for i in ids)])[1:]

    fields, sequences = [], {}
    sides: tuple[tuple[str, Block], ...] = (("request", batch.request), ("item", batch.item))
    for b in range(batch.num_rows):
        own = []
        for side, block in sides:
            row = row_of(b, side)
            own += [vectors(block.single, key, row)[0] for key in block.single.keys]
            for key in block.bags.keys:
                bag, feature = vectors(block.bags, key, row), spec.feature(key)
                assert isinstance(feature, IdFeature)
                own.append(bag.sum(0) / (max(len(bag), 1) if feature.pooling == "mean" else 1))
            for key in block.sequences.keys:
                sequences.setdefault(key, []).append(vectors(block.sequences, key, row))
        fields.append(torch.stack(own))
    out = {group: torch.stack(fields)}
    for key, rows in sequences.items():
        length = max(1, *(len(r) for r in rows))
        out[f"{group}.seq.{key}"] = torch.stack([torch.cat([r, r.new_zeros(length - len(r), dim)]) for r in rows])
        out[f"mask.{key}"] = torch.stack([torch.arange(length) < len(r) for r in rows])
    return out


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), requests=st.one_of(st.none(), st.integers(1, 4)), most=st.integers(0, 6), seed=st.integers(0, 999))
def test_lookup_equals_naive_loops(
    spec: FeatureSpec, make_batch: MakeBatch, mode: str, rows: int, requests: int | None, most: int, seed: int
) -> None:
    batch, collection = make_batch(spec, rows, requests=requests, most=most, seed=seed), collection_of(spec, mode)
    got = collection(batch)
    for group in GROUPS:
        for key, want in naive(spec, collection, batch, group).items():
            if requests is not None and key not in ("deep", "linear"):  # padded to the longest request, looked up by a candidate or not
                want = torch.nn.functional.pad(want, (0, 0, 0, got[key].shape[1] - want.shape[1])[-2 * (want.dim() - 1) :])  # noqa: PLW2901
            torch.testing.assert_close(got[key].double(), want.double(), atol=1e-6, rtol=1e-6)
    dense_request = batch.request.dense_RF if batch.user_row_B is None else batch.request.dense_RF[batch.user_row_B]
    assert torch.equal(got["dense"], torch.cat([dense_request, batch.item.dense_RF], 1))


def test_pooled_keys_name_the_fields_in_order(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    assert pooled_keys(spec) == ("user", "hour", "age", "last_item", "interests", "item", "tags", "brands")
    batch, collection = make_batch(spec, 4), collection_of(spec)
    field = pooled_keys(spec).index("item")
    want = dict(collection.named_groups())["deep"].table("item")[batch.item.single["item"].values]
    assert torch.equal(collection(batch)["deep"][:, field], want)


@pytest.mark.parametrize("requests", [1, 3])
def test_rank_batch_equals_expanded_training_batch(spec: FeatureSpec, make_batch: MakeBatch, requests: int) -> None:
    batch, collection = make_batch(spec, 7, requests=requests, seed=5), collection_of(spec)
    assert batch.user_row_B is not None

    def expand(ids: KeyedJagged) -> KeyedJagged:
        assert batch.user_row_B is not None
        parts = [(j.values[j.offsets[u] : j.offsets[u + 1]]) for _, j in ids.items() for u in batch.user_row_B.tolist()]
        lengths = None if ids.lengths is None else torch.tensor([len(part) for part in parts])
        return KeyedJagged(ids.keys, torch.cat([ids.values[:0], *parts]), lengths, 7)

    r = batch.request
    expanded = Block(expand(r.single), expand(r.bags), expand(r.sequences), r.dense_RF[batch.user_row_B])
    want, got = collection(replace(batch, request=expanded, user_row_B=None)), collection(batch)
    assert want.keys() == got.keys()
    for key, value in want.items():
        shorter = min(value.shape[1], got[key].shape[1])  # no candidate may point at the request with the longest history
        assert torch.equal(value[:, :shorter], got[key][:, :shorter])
        assert not got[key][:, shorter:].any()


def test_gradients_of_both_modes_agree_and_check_numerically(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batch = make_batch(spec, 6, requests=2, seed=11)
    sparse, dense = collection_of(spec, "sparse"), collection_of(spec, "dense")
    draw = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(value.shape, generator=draw) for key, value in dense(batch).items() if value.is_floating_point()}

    def loss(collection: EmbeddingCollection) -> Tensor:
        return torch.stack([(collection(batch)[key] * weight).sum() for key, weight in weights.items()]).sum()

    loss(sparse).backward()
    loss(dense).backward()
    for (_, a), (_, b) in zip(sparse.named_groups(), dense.named_groups(), strict=True):
        summed = a.gradients.coalesced(a.layout.total_rows)
        assert summed is not None
        assert b.storage.grad is not None
        row_K, grad_KD = summed.rows_N, summed.grad_GD
        assert torch.equal(row_K, row_K.unique())
        torch.testing.assert_close(torch.zeros_like(b.storage).index_copy(0, row_K.long(), grad_KD), b.storage.grad, atol=1e-5, rtol=1e-5)
    dense.double()
    dense_batch = replace(
        batch,
        request=replace(batch.request, dense_RF=batch.request.dense_RF.double()),
        item=replace(batch.item, dense_RF=batch.item.dense_RF.double()),
    )
    storage = dict(dense.named_groups())["linear"].storage

    def output(value: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(dense, {"groups.linear.storage": value}, (dense_batch,))
        return tuple(v for k, v in out.items() if k.startswith("linear"))

    assert torch.autograd.gradcheck(output, (storage.detach().clone().requires_grad_(),), fast_mode=True)


def test_untouched_rows_take_no_sparse_gradient(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batch, collection = make_batch(spec, 3, most=2), collection_of(spec)
    sum(v.sum() for k, v in collection(batch).items() if v.is_floating_point() and k != "dense").backward()  # type: ignore[union-attr]
    pending = collection.named_groups()[0][1].gradients
    assert pending
    touched = set()
    for block in (batch.request, batch.item):
        for part in (block.single, block.bags, block.sequences):
            for key, ids in part.items():
                touched |= {collection.layout.rows_of(str(spec.table_of(key))).start + i for i in ids.values.tolist()}
    assert set(pending.rows().tolist()) == touched


def test_lookup_without_gradient_records_nothing(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    collection = collection_of(spec)
    with torch.no_grad():
        out = collection(make_batch(spec, 3))
    assert not out["deep"].requires_grad
    assert not collection.named_groups()[0][1].gradients
    assert not [p for p in collection.parameters() if p.requires_grad]


def test_max_padding_gives_static_shapes(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batch = make_batch(spec, 3, most=2)
    longest, greatest = collection_of(spec)(batch), collection_of(spec, sequence_length="max")(batch)
    assert greatest["deep.seq.recent"].shape == (3, 6, 5)
    assert greatest["mask.similar"].shape == (3, 3)
    assert torch.equal(greatest["deep.seq.recent"][:, : longest["mask.recent"].shape[1]], longest["deep.seq.recent"])


def test_empty_histories_still_have_one_place(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    out = collection_of(spec)(make_batch(spec, 2, most=0))
    assert out["deep.seq.recent"].shape == (2, 1, 5)
    assert not out["mask.recent"].any()
    assert not out["deep"][:, pooled_keys(spec).index("tags")].any()


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 9), requests=st.one_of(st.none(), st.integers(1, 4)), most=st.integers(0, 6), seed=st.integers(0, 999))
def test_jagged_histories_are_the_padded_ones_without_padding(
    spec: FeatureSpec, make_batch: MakeBatch, mode: str, rows: int, requests: int | None, most: int, seed: int
) -> None:
    batch = make_batch(spec, max(rows, 1) if requests is None else rows, requests=requests, most=most, seed=seed)
    padded, jagged = collection_of(spec, mode)(batch), collection_of(spec, mode, sequence_length="jagged")
    got = jagged(batch)
    for name in ("recent", "similar"):
        mask_BL = padded[f"mask.{name}"]
        assert torch.equal(got[f"offsets.{name}"].diff(), mask_BL.sum(1))
        assert f"mask.{name}" not in got
        for group in GROUPS:
            assert torch.equal(got[f"{group}.seq.{name}"], padded[f"{group}.seq.{name}"][mask_BL])
    assert all(torch.equal(got[key], padded[key]) for key in ("dense", *GROUPS))
    assert jagged(batch, pad=True).keys() == padded.keys()
    assert "mask.recent" in jagged.sides(batch)


def test_jagged_histories_train_the_rows_that_padded_ones_do(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    batch, grads = make_batch(spec, 5, requests=2, most=4), []
    for length in ("longest", "jagged"):
        collection = collection_of(spec, "dense", sequence_length=length)
        sum(out.square().sum() for key, out in collection(batch).items() if ".seq." in key).backward()
        grads.append(dict(collection.named_groups())["deep"].storage.grad)
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].any()


@pytest.mark.parametrize("bad", [-1, 31, 2**40])
@pytest.mark.parametrize("kind", ["single", "bags", "sequences"])
def test_id_outside_its_table_is_refused_by_name(spec: FeatureSpec, make_batch: MakeBatch, kind: str, bad: int) -> None:
    batch = make_batch(spec, 5, most=3, seed=2)
    key = {"single": "item", "bags": "tags", "sequences": "similar"}[kind]
    ids: KeyedJagged = getattr(batch.item, kind)
    place = int(ids.offsets()[ids.keys.index(key) * 5 : (ids.keys.index(key) + 1) * 5][-1])
    values = ids.values.clone()
    values[place] = bad
    table = str(spec.table_of(key))
    size = spec.tables[table].num_rows
    broken = replace(batch, item=replace(batch.item, **{kind: replace(ids, values=values)}))
    with pytest.raises(DataError, match=rf"feature '{key}': id {bad} is outside table '{table}' of {size} rows \(valid: 0 to {size - 1}\)"):
        collection_of(spec)(broken)


def test_batch_of_another_spec_is_refused(spec: FeatureSpec, narrow_spec: FeatureSpec, make_batch: MakeBatch) -> None:
    with pytest.raises(DataError, match="holds the features"):
        collection_of(spec)(make_batch(narrow_spec, 2))
    batch = make_batch(narrow_spec, 2)
    with pytest.raises(DataError, match="3 request rows and 2 item rows"):
        collection_of(narrow_spec)(replace(batch, request=make_batch(narrow_spec, 3).request))
    ranked = make_batch(narrow_spec, 3, requests=2)
    with pytest.raises(DataError, match="names a request row for 1 candidates, the batch has 3"):
        collection_of(narrow_spec)(replace(ranked, user_row_B=torch.zeros(1, dtype=torch.int64)))
    for bad in (-1, 2):
        with pytest.raises(DataError, match="request rows 0 to 1"):
            collection_of(narrow_spec)(replace(ranked, user_row_B=torch.tensor([0, bad, 1])))
    too_long = make_batch(spec, 2)
    lengths = torch.tensor([7, 0, 0, 0])
    sequences = KeyedJagged(too_long.request.sequences.keys, torch.zeros(7, dtype=torch.int64), lengths, 2)
    with pytest.raises(DataError, match="sequence 'recent': 7 ids in a row, at most 6"):
        collection_of(spec)(replace(too_long, request=replace(too_long.request, sequences=sequences)))


def test_spec_that_is_not_fitted_is_refused() -> None:
    spec = FeatureSpec(labels=("click",), features=(IdFeature(name="u", role="user", encoding=Vocabulary()),))
    with pytest.raises(SpecError, match="not fitted"):
        collection_of(spec)


def test_l2_covers_all_rows_of_all_groups_and_needs_dense_mode(spec: FeatureSpec) -> None:
    collection = collection_of(spec, "dense", l2=0.3)
    want = sum(0.15 * float(group.storage.detach().double().square().sum()) for _, group in collection.named_groups())
    penalty = collection.l2_penalty()
    assert penalty.item() == pytest.approx(want, rel=1e-6)
    penalty.backward()
    storage = collection.named_groups()[0][1].storage
    torch.testing.assert_close(storage.grad, 0.3 * storage.detach())
    with pytest.raises(SpecError, match="weight_decay"):
        collection_of(spec, "sparse", l2=0.3)


def test_start_values_depend_on_names_not_on_order_or_global_state(spec: FeatureSpec) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = collection_of(spec)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = collection_of(spec.model_copy(update={"features": spec.features[::-1]}), groups={"linear": 2, "deep": 5})
    assert one.layout.names != other.layout.names
    state = other.state_dict()
    for key, value in one.state_dict().items():
        assert torch.equal(value, state[key]), key
    deep, linear = (dict(one.named_groups())[name].table("item") for name in ("deep", "linear"))
    assert not torch.equal(deep[:, :2], linear)


def test_state_holds_one_tensor_per_table_and_loads_into_another_order(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    one = collection_of(spec)
    assert set(one.state_dict()) == {f"groups.{group}.{table}" for group in GROUPS for table in spec.tables}
    other = EmbeddingCollection(spec.model_copy(update={"features": spec.features[::-1]}), GROUPS, EmbeddingConfig(), seed=99)
    other.load_state_dict(one.state_dict())
    for name, group in one.named_groups():
        for table in spec.tables:
            assert torch.equal(group.table(table), dict(other.named_groups())[name].table(table))
    state = one.state_dict()
    state["groups.deep.item"] = state["groups.deep.item"][:-1]
    with pytest.raises(RuntimeError, match=r"table groups.deep.item: shape \(30, 5\) in the state, \(31, 5\)"):
        other.load_state_dict(state)
    del state["groups.deep.item"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**one.state_dict(), "groups.deep.nobody": torch.zeros(1)})


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_collection_over_quantised_tables_looks_up_what_they_hold(dtype: TableDtype, spec: FeatureSpec, make_batch: MakeBatch) -> None:
    trained, batch = collection_of(spec), make_batch(spec, 4, requests=2)
    stored = {name: quantize(group.storage.detach(), dtype) for name, group in trained.named_groups()}
    restored = {name: table.dequantized() for name, table in stored.items()}
    want = EmbeddingCollection.of_tables(spec, restored, EmbeddingConfig())(batch)
    got = EmbeddingCollection.of_tables(spec, stored, EmbeddingConfig())(batch)
    assert want.keys() == got.keys()
    for key, value in got.items():
        torch.testing.assert_close(value, want[key], rtol=1e-6, atol=1e-6)
    assert not torch.equal(want["deep"], trained(batch)["deep"]) or dtype == "fp32"
    with pytest.raises(SpecError, match=r"group 'deep': storage is \(3, \d+\), the spec needs \d+ rows"):
        EmbeddingCollection.of_tables(spec, {"deep": quantize(torch.zeros(3, 5), dtype)}, EmbeddingConfig())


def test_collection_over_given_tables_shares_them(spec: FeatureSpec, make_batch: MakeBatch) -> None:
    trained, batch = collection_of(spec), make_batch(spec, 4, requests=2)
    tables = {name: group.storage.detach() for name, group in trained.named_groups()}
    served = EmbeddingCollection.of_tables(spec, tables, EmbeddingConfig())
    want, got = trained(batch), served(batch)
    assert all(torch.equal(want[key], value) for key, value in got.items())
    assert served.named_groups()[0][1].storage.data_ptr() == tables["deep"].data_ptr()
    with pytest.raises(SpecError, match=r"group 'deep': storage is \(3, 5\), the spec needs \d+ rows"):
        EmbeddingCollection.of_tables(spec, {"deep": torch.zeros(3, 5)}, EmbeddingConfig())
