"""Differentiable reads of a dynamic table's rows.

The backward leaves (row, gradient) pairs beside the table, as static tables do; the default row takes none.
Shape legend: N looked-up ids, V rows in use, D embedding dim.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ninerank.embedding.table import RowGradients

__all__ = ["OwnRowGradients", "gather_rows"]


class OwnRowGradients(RowGradients):
    """Gradients of rows that belong to an id: the default row takes none."""

    def add(self, row_N: Tensor, grad_ND: Tensor) -> None:
        row_N, grad_ND = row_N.reshape(-1), grad_ND.reshape(row_N.numel(), grad_ND.shape[-1])
        own_N = row_N != 0
        super().add(*((row_N, grad_ND) if bool(own_N.all()) else (row_N[own_N], grad_ND[own_N])))

    def pairs(self) -> tuple[Tensor, Tensor] | None:
        """Rows (N,) that may repeat, and their gradients (N, D), in the order in which they came; None if there are none."""
        if not self._parts:
            return None
        if len(self._parts) > 1:
            rows, gradients = zip(*self._parts, strict=True)
            self._parts = [(torch.cat(rows), torch.cat(gradients))]
        return self._parts[0]


class _GatherRows(torch.autograd.Function):
    """values_VD[row_N], whose backward leaves (row, gradient) pairs in `sink`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values_VD: Tensor, row_N: Tensor, sink: RowGradients) -> Tensor:
        ctx.save_for_backward(row_N)
        ctx.sink = sink
        return functional.embedding(row_N, values_VD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[None, None, None, None]:
        ctx.sink.add(ctx.saved_tensors[0], grad_ND)
        return None, None, None, None


def gather_rows(values_VD: Tensor, row_N: Tensor, sink: RowGradients) -> Tensor:
    """values_VD[row_N], whose backward adds to `sink`."""
    anchor = torch.empty(0, requires_grad=True)  # autograd records only what depends on a leaf
    return cast("Tensor", _GatherRows.apply(anchor, values_VD, row_N, sink))  # type: ignore[no-untyped-call]
