"""Weights of a graph by the node that reads them."""

from typing import Any

from torch import Tensor, fx

from ninerank.fusion.capture import weight_of

__all__ = ["constant_of"]


def constant_of(module: fx.GraphModule, argument: Any) -> Tensor | None:
    """The tensor that a node reads from the module; None for anything else."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    return weight_of(module, str(argument.target)).detach()
