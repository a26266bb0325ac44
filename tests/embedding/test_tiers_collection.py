"""Tiered tables in a collection, under the sparse optimizer and clipping."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.embedding.optimizer import SparseOptimizer, SparseOptimizerConfig, clip_grad_norm_
from ninerank.embedding.tiers import TierConfig, TieredTable
from ninerank.features.batch import Batch
from ninerank.features.spec import Dynamic, FeatureSpec, IdFeature

MakeBatch = Callable[..., Batch]
GROUPS = {"deep": 4, "linear": 1}
TIERED = ("item", "tags", "hour")


def collection(spec: FeatureSpec, cache_rows: int | None) -> EmbeddingCollection:
    """Static tables, or, with cache_rows, the TIERED ones in tiers (the spec leaves these to whoever manages them)."""
    config = EmbeddingConfig(init_std=0.3)
    if cache_rows is None:
        return EmbeddingCollection(spec, GROUPS, config, seed=0)
    own = {"encoding": Dynamic()}
    features = tuple(f.model_copy(update=own) if isinstance(f, IdFeature) and f.table_name in TIERED else f for f in spec.features)
    managed = EmbeddingCollection(spec.model_copy(update={"features": features}), GROUPS, config, seed=0)
    for name in TIERED:
        tier = TierConfig(cache_rows=cache_rows)
        managed.managed[name] = TieredTable(name, spec.tables[name].num_rows, GROUPS, tier, seed=0, init_std=0.3)
    return managed


def tables(embedding: EmbeddingCollection) -> dict[str, Tensor]:
    """Values of the tiered tables, `<group>.<table>`, wherever they lie."""
    if not embedding.managed:
        return {f"{name}.{table}": group.table(table).clone() for name, group in embedding.named_groups() for table in TIERED}
    states = {table: embedding.managed[table].values_state() for table in TIERED}
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
    small.load_state_dict({name: tensor.clone() for name, tensor in large.state_dict().items()})
    with torch.no_grad():
        for key, value in large(batches[0]).items():
            assert torch.equal(small(batches[0])[key], value), key
    for embedding in (small, large):
        for name in TIERED:
            table = embedding.managed[name]
            assert isinstance(table, TieredTable)
            table.close()
