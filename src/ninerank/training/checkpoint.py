"""Checkpoints of a run, its best weights, and the trained run as export and evaluation take it.

    RUN/checkpoints/step-<n>/   manifest.json  state.json  model.safetensors  optimizer.safetensors  random.safetensors
    RUN/best/                   manifest.json  model-<digest>.safetensors

No file is unpickled; every file is checked against its SHA-256 before a byte of it is used.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ninerank.errors import CheckpointError
from ninerank.training import sealed

__all__ = ["BestWeights", "Checkpoint", "CheckpointStore", "load_weights"]

FORMAT = "ninerank.checkpoint.v1"


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds: tensors by file (`model`, `optimizer`, `random`) and JSON state."""

    name: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints of one run; the newest `keep_last` are kept."""

    def __init__(self, directory: Path, *, keep_last: int, spec_digest: str) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.spec_digest = spec_digest

    def names(self) -> list[str]:
        """Complete or damaged, oldest first: `step-<n>`."""
        found = [path.name for path in self.directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(found, key=_step)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write `step-<step>` beside, rename it into place, and delete the oldest beyond `keep_last`."""
        target = self.directory / f"step-{step}"
        files: dict[str, sealed.Writer] = {f"{name}.safetensors": tensor_writer(group) for name, group in tensors.items()}
        files["state.json"] = lambda path: _write_bytes(path, sealed.json_bytes(state))
        sealed.write(target, files, {"format": FORMAT, "step": step, "spec_digest": self.spec_digest})
        for stale in self.directory.glob(".*"):
            shutil.rmtree(stale, ignore_errors=True)
        for name in self.names()[: -self.keep_last]:
            sealed.remove(self.directory / name)
        return target

    def load(self, name: str | None = None) -> Checkpoint | None:
        """The checkpoint of that name, or the newest, or None where there is none.

        Raises CheckpointError for a name that is not there, a file that is missing, truncated or corrupt (the newest checkpoint
        before it that is sound is named), and for a checkpoint of another spec (both digests are named).
        """
        names = self.names()
        if name is not None and name not in names:
            raise CheckpointError(f"{self.directory}: has no checkpoint {name!r}; there are: {', '.join(names) or 'none'}")
        if not names:
            return None
        chosen = name or names[-1]
        try:
            return self._read(chosen)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._offer(names[: names.index(chosen)])}") from None

    def _read(self, name: str) -> Checkpoint:
        whole = sealed.verify(self.directory / name)
        check_manifest(self.directory / name, whole.extra, self.spec_digest)
        tensors = {path.name.partition(".")[0]: read_tensors(path) for path in whole.paths.values() if path.suffix == ".safetensors"}
        return Checkpoint(name, tensors, json.loads(whole.paths["state.json"].read_bytes()))

    def _offer(self, older: list[str]) -> str:
        for name in reversed(older):
            try:
                self._read(name)
            except CheckpointError:
                continue
            return f"the checkpoint before it, {name}, is sound: resume from that one with --resume-from {name}"
        return "there is no sound checkpoint before it"


class BestWeights:
    """Weights of the best epoch so far, replaced in one rename."""

    def __init__(self, directory: Path, *, spec_digest: str) -> None:
        self.directory = directory
        self.spec_digest = spec_digest

    def save(self, weights: Mapping[str, Tensor], *, epoch: int) -> None:
        extra = {"format": FORMAT, "epoch": epoch, "spec_digest": self.spec_digest}
        sealed.replace(self.directory, {"model.safetensors": tensor_writer(weights)}, extra)

    def load(self) -> Mapping[str, Tensor]:
        """Raises CheckpointError if they are missing, damaged or of another spec."""
        whole = sealed.verify(self.directory)
        check_manifest(self.directory, whole.extra, self.spec_digest)
        return read_tensors(whole.paths["model.safetensors"])


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load a whole state dict; raises CheckpointError naming `what` if a tensor is missing, left over or of another shape."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{what}: does not fit the model of the recipe: {' '.join(str(error).split())}") from None


def tensor_writer(tensors: Mapping[str, Tensor]) -> sealed.Writer:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return lambda path: safetensors.torch.save_file(held, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def check_manifest(directory: Path, extra: Mapping[str, Any], spec_digest: str) -> None:
    if extra.get("format") != FORMAT:
        raise CheckpointError(f"{directory}: has format {extra.get('format')!r}, {FORMAT!r} is needed")
    if extra.get("spec_digest") != spec_digest:
        raise CheckpointError(f"{directory}: was made with spec {extra.get('spec_digest')}, this run's spec is {spec_digest}")


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
