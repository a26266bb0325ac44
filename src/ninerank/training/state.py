"""State of optimizers and generators as tensors and JSON, so that a checkpoint needs no pickle."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ninerank.embedding.shard import Shard
from ninerank.errors import CheckpointError

__all__ = ["flatten", "generator_state", "reseed", "restore", "restore_generators"]


def flatten(tree: object, prefix: str, tensors: dict[str, Any]) -> Any:
    """JSON form of nested dicts, lists, tuples and numbers; a tensor or shard goes to `tensors` under a name that starts with `prefix`.

    >>> found = {}
    >>> flatten({"state": {0: torch.ones(2)}, "lr": 0.1, "betas": (0.9, 0.999)}, "adam", found)
    {'dict': [['state', {'dict': [[0, {'tensor': 'adam.state.0'}]]}], ['lr', 0.1], ['betas', {'tuple': [0.9, 0.999]}]]}
    >>> found
    {'adam.state.0': tensor([1., 1.])}
    """
    if isinstance(tree, Shard):
        tensors[prefix] = tree
        return {"tensor": prefix}
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach()
        return {"tensor": prefix}
    if isinstance(tree, Mapping):
        return {"dict": [[key, flatten(value, f"{prefix}.{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [flatten(value, f"{prefix}.{i}", tensors) for i, value in enumerate(tree)]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{prefix}: {type(tree).__name__} has no place in a checkpoint")


def restore(form: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given."""
    if isinstance(form, list):
        return [restore(item, tensors) for item in form]
    if not isinstance(form, dict):
        return form
    if "tensor" in form:
        if form["tensor"] not in tensors:
            raise CheckpointError(f"state: tensor {form['tensor']!r} is missing")
        return tensors[form["tensor"]]
    if "tuple" in form:
        return tuple(restore(item, tensors) for item in form["tuple"])
    return {key: restore(value, tensors) for key, value in form["dict"]}


def generator_state(device: torch.device) -> dict[str, Tensor]:
    """State of the random generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def reseed(seed: int, step: int, rank: int) -> int:
    """Seed of a process that goes on where another number of processes stopped: none of them has a state that would be its own."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def restore_generators(device: torch.device, state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
