"""Random batches hold what the spec allows, and all of it can occur."""

import torch

from ninerank.embedding.collection import EmbeddingCollection, EmbeddingConfig
from ninerank.features.draw import draw_batch
from ninerank.features.encoding import Hashed
from ninerank.features.spec import FeatureSpec, IdFeature, NumericFeature, SequenceFeature

SPEC = FeatureSpec(
    labels=("click", "buy"),
    features=(
        IdFeature(name="user", role="user", encoding=Hashed(num_buckets=5)),
        IdFeature(name="item", role="item", encoding=Hashed(num_buckets=7)),
        IdFeature(name="tags", role="item", encoding=Hashed(num_buckets=3), multi=True),
        SequenceFeature(name="recent", role="user", of="item", max_length=6),
        NumericFeature(name="price", role="item"),
    ),
)


def test_ids_lie_in_their_tables_and_reach_every_row() -> None:
    batch = draw_batch(SPEC, 400, torch.Generator().manual_seed(0), num_requests=50)
    EmbeddingCollection(SPEC, {"deep": 4}, EmbeddingConfig(), seed=0).check(batch)
    assert set(batch.item.single.values.tolist()) == set(range(8))
    assert set(batch.request.single.values.tolist()) == set(range(6))
    assert batch.user_row_B is not None
    assert set(batch.user_row_B.tolist()) <= set(range(50))
    assert batch.label_BT is None


def test_lengths_keep_their_bounds_and_empty_rows_occur() -> None:
    for longest, most in ((None, 6), (2, 2)):
        batch = draw_batch(SPEC, 300, torch.Generator().manual_seed(0), longest=longest)
        lengths = batch.request.sequences.lengths
        assert lengths is not None
        assert set(lengths.tolist()) == set(range(most + 1))
        assert int(lengths.sum()) == batch.request.sequences.values.numel()


def test_training_rows_have_labels_and_weights_and_the_seed_decides() -> None:
    first, again = (draw_batch(SPEC, 9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.label_BT is not None
    assert again.label_BT is not None
    assert first.label_BT.shape == (9, 2)
    assert torch.equal(first.label_BT, again.label_BT)
    assert torch.equal(first.item.dense_RF, again.item.dense_RF)
