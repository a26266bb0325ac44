"""Weights of the best epoch."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ninerank.training import sealed
from ninerank.training.checkpoint.archive import Archive, save_archive
from ninerank.training.checkpoint.peers import Peers
from ninerank.training.checkpoint.tree import Tree

__all__ = ["BestWeights"]


class BestWeights:
    """Weights of the best epoch so far, replaced in one rename while others may read them.

    peers: not those of a store, which may be saving in the background meanwhile.
    """

    def __init__(self, directory: Path, *, spec_digest: str, peers: Peers | None = None) -> None:
        self.directory = directory
        self.spec_digest = spec_digest
        self.peers = peers or Peers()

    def save(self, weights: Tree, *, epoch: int) -> None:
        """Write the weights of all processes; returns when they are there. Raises CheckpointError if they cannot be written."""

        def publish(draft: sealed.Draft, extra: dict[str, object]) -> None:
            draft.release(extra | {"epoch": epoch})
            sealed.recover(self.directory.parent, self.directory.name)

        save_archive(self.directory, {"model": weights}, {}, publish, spec_digest=self.spec_digest, peers=self.peers)

    def open(self) -> Archive:
        """The verified weights, to be read block by block; raises CheckpointError as `load` does."""
        return Archive.open(self.directory, spec_digest=self.spec_digest, peers=self.peers)

    def load(self) -> Mapping[str, Tensor]:
        """All weights, whole, in new host memory, as one process's `state_dict` names them; tables by id as those of all processes.

        Raises CheckpointError if they are missing, damaged or of another spec.
        """
        archive = self.open()
        found = archive.section("model")
        for name in (name for name in archive.extra["parts"] if archive.is_by_id(name)):
            columns = archive.by_id(name, rank=0, world_size=1)
            found.update({f"{name.removeprefix('model.')}.{column}": tensor for column, tensor in columns.items()})
        return found
