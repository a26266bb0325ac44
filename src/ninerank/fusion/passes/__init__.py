"""Passes over captured graphs, in the order in which the compiler tries them; one file each.

A pass is a function of an `Editor` that changes the graph and returns how often it fired. It must leave the scores as they are; the
compiler checks that, and takes back what is wrong or does not pay.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ninerank.fusion.editor import Editor
from ninerank.fusion.passes import (
    affine,
    attention,
    batch_norm,
    bilinear,
    cin,
    concats,
    constants,
    dead,
    dot,
    duplicates,
    hoist,
    linears,
    parallel,
    siblings,
    sums,
)

__all__ = ["PASSES", "Pass"]


@dataclass(frozen=True)
class Pass:
    """One pass. prepares: what it costs is judged together with the passes that follow it."""

    name: str
    apply: Callable[[Editor], int]
    prepares: bool = False


PASSES = (
    Pass("constants", constants.apply),
    Pass("dead", dead.apply),
    Pass("duplicates", duplicates.apply),
    Pass("batch_norm", batch_norm.apply),
    Pass("affine", affine.apply),
    Pass("siblings", siblings.apply),
    Pass("hoist", hoist.apply),
    Pass("concats", concats.apply, prepares=True),
    Pass("attention", attention.apply),
    Pass("sums", sums.apply, prepares=True),
    Pass("dot", dot.apply, prepares=True),
    Pass("cin", cin.apply),
    Pass("bilinear", bilinear.apply, prepares=True),
    Pass("linears", linears.apply),
    Pass("parallel", parallel.apply),
)
