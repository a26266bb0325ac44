"""What a tower gets to see of a spec, and the model: lookup, then tower.

Shape legend: B scored rows, T tasks.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ninerank.embedding.collection import EmbeddingCollection, pooled_keys
from ninerank.embedding.shard import Shard
from ninerank.features.batch import Batch
from ninerank.features.spec import FeatureSpec, SequenceFeature

__all__ = ["RankingModel", "SequenceShape", "TowerShape"]


@dataclass(frozen=True)
class SequenceShape:
    """One sequence input; `target` is the place of the field it is a history `of` among the pooled fields."""

    name: str
    target: int


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a tower's inputs: pooled fields, dense numbers, sequences, and the number of logits."""

    num_fields: int
    num_dense: int
    sequences: tuple[SequenceShape, ...]
    num_tasks: int

    @classmethod
    def of(cls, spec: FeatureSpec) -> "TowerShape":
        pooled = pooled_keys(spec)
        sequences = tuple(SequenceShape(f.name, pooled.index(f.of)) for f in spec.features if isinstance(f, SequenceFeature))
        num_dense = len(spec.dense_keys("request")) + len(spec.dense_keys("item"))
        return cls(len(pooled), num_dense, sequences, len(spec.labels))


class RankingModel(nn.Module):
    """logits_BT = tower(embedding(batch))."""

    def __init__(self, embedding: EmbeddingCollection, tower: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.tower = tower

    @property
    def num_parameters(self) -> int:
        """Numbers that are learned, those of managed tables as they are now."""
        return sum(parameter.numel() for parameter in self.tower.parameters()) + self.embedding.num_values

    def static_state(self, *, reading: bool = False) -> dict[str, Tensor | Shard]:
        """`state_dict` without managed tables, whose `state` is by id and of any length; of sharded tables this process's blocks.

        reading: to be filled in place, so that every process names whatever it holds.
        """
        tower: dict[str, Tensor | Shard] = self.tower.state_dict(prefix="tower.")
        return tower | {f"embedding.{key}": value for key, value in self.embedding.static_state(reading=reading).items()}

    def forward(self, batch: Batch) -> Tensor:
        logits_BT: Tensor = self.tower(self.embedding(batch))
        return logits_BT
