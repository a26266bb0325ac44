"""Tiered tables in a collection, under the sparse optimizer and clipping."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.optimizer import SparseOptimizer, SparseOptimizerConfig, clip_grad_norm_
from ninerank.embedding.tiers import TierConfig
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec

MakeBatch = Callable[..., Batch]
GROUPS = {"deep": 4, "linear": 1}
TIERED = ("item", "tags", "hour")


def collection(spec: FeatureSpec, cache_rows: int | None) -> EmbeddingCollection:
    """Static tables, or, with cache_rows, the TIERED ones in tiers."""
    own = {} if cache_rows is None else {name: TierConfig(cache_rows=cache_rows) for name in TIERED}
    return EmbeddingCollection(spec, GROUPS, EmbeddingConfig(init_std=0.3, tiers=own), seed=0)


def tables(embedding: EmbeddingCollection) -> dict[str, Tensor]:
    """Values of the tiered tables, `<group>.<table>`, wherever they lie."""
    if not embedding.managed:
        return {f"{name}.{table}": group.table(table).clone() for name, group in embedding.named_groups() for table in TIERED}
    states = {table: embedding.tiers[table].values_state() for table in TIERED}
    return {f"{group}.{table}": states[table][f"value.{group}"].clone() for group in GROUPS for table in TIERED}


def trained(embedding: EmbeddingCollection, batches: list[Batch], kind: str) -> list[Tensor]:
    """Losses and norms of one step a batch; the next batch is announced while one trains."""
    optimizer = SparseOptimizer(embedding, SparseOptimizerConfig.parse({"kind": kind, "lr": 0.1}, "test"))
    figures = []
    for step, batch in enumerate(batches):
        out = embedding(embedding.prepare(batch, step=step))
        values = [value for _, value in sorted(out.items()) if value.is_floating_point() and value.requires_grad]
        loss = torch.stack([(value.cos() * (i + 1)).sum() for i, value in enumerate(values)]).sum()
        optimizer.zero_grad()
        loss.backward()
        figures += [loss.detach(), clip_grad_norm_([], optimizer, 3.0)]
        optimizer.step()
        embedding.finish_step(step)
    return figures


@pytest.mark.parametrize("kind", ["adam", "rowwise_adagrad"])
def test_trains_as_in_memory(spec: FeatureSpec, make_batch: MakeBatch, kind: str) -> None:
    """Bit for bit the same for a small cache and one that holds everything, clipping included; static tables agree but for rounding."""
    batches = [make_batch(spec, 5, seed=seed) for seed in range(12)]
    small, large, static = (collection(spec, cache_rows) for cache_rows in (24, 10_000, None))
    losses = [torch.stack(trained(embedding, batches, kind)) for embedding in (small, large, static)]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    for name, value in tables(static).items():
        assert torch.equal(tables(small)[name], tables(large)[name]), name
        torch.testing.assert_close(tables(small)[name], value)
    assert small.table_metrics()["table.item.evictions"] > 0
    assert large.table_metrics()["table.item.evictions"] == 0
    assert small.state_dict().keys() == static.state_dict().keys()
    small.load_state_dict({name: tensor.clone() for name, tensor in large.state_dict().items()})
    with torch.no_grad():
        for key, value in large(batches[0]).items():
            assert torch.equal(small(batches[0])[key], value), key
    for embedding in (small, large):
        embedding.close()


def test_states_that_do_not_fit(spec: FeatureSpec) -> None:
    embedding = collection(spec, 24)
    state = dict(collection(spec, None).state_dict())
    embedding.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*groups\.deep\.item"):
        embedding.load_state_dict({key: value for key, value in state.items() if key != "groups.deep.item"})
    with pytest.raises(RuntimeError, match=r"table 'item': 'value\.deep' is torch\.float32 \(2, 4\)"):
        embedding.load_state_dict(state | {"groups.deep.item": torch.zeros(2, 4)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*groups\.deep\.itm"):
        embedding.load_state_dict(state | {"groups.deep.itm": torch.zeros(2, 4)})
    embedding.close()


def test_caches_go_where_the_model_goes(spec: FeatureSpec) -> None:
    embedding = collection(spec, 24)
    assert {table.device.type for table in embedding.tiers.values()} == {"cpu"}
    embedding.to("meta")
    assert {table.device.type for table in embedding.tiers.values()} == {"meta"}
