"""Checkpoints of a run, its best weights, and what a model's state looks like when several processes hold it.

store.py       CheckpointStore: save, load, keep the newest       weights.py   BestWeights
managed.py     tables with a storage of their own                archive.py   directories of tensors, and what reads them
tree.py        what may be saved: tensors, shards, tables by id   staging.py   the snapshot that an asynchronous save writes
planner.py     who writes and who reads which block               storage.py   files and manifest
tensorfile.py  safetensors written and hashed in one pass         peers.py     the processes that save and load together

    RUN/checkpoints/step-<n>/   manifest.json  state.json  rank-<r>.safetensors, one a process
    RUN/best/                   manifest.json  rank-<r>-<digest>.safetensors

No file is unpickled; every file is checked against its SHA-256 before a byte of it is used.
"""

from ninerank.training.checkpoint.store import Checkpoint, CheckpointStore
from ninerank.training.checkpoint.tree import ById, PerProcess
from ninerank.training.checkpoint.weights import BestWeights

__all__ = ["BestWeights", "ById", "Checkpoint", "CheckpointStore", "PerProcess"]
