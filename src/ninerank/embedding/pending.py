"""Gradients of looked-up rows that wait for the optimizer's step."""

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_update import RowOptimizer
from ninerank.fusion.lookup import LookupGrad

__all__ = ["PendingGradients"]


class PendingGradients:
    """What backward passes left for one storage since the last `clear`, from any number of lookups.

    Entries stay as they came, with duplicates, until `coalesced` is asked for or `apply` hands them to the fused update: both sum a
    row's duplicates once, in the order of the lookups. skip_row: a row that takes no gradient (a default row), or None.
    """

    def __init__(self, skip_row: int | None = None) -> None:
        self._skip_row = skip_row
        self._parts: list[LookupGrad] = []
        self._factor: Tensor | None = None

    def add(self, grad: LookupGrad) -> None:
        """Leave the gradient of one lookup. Raises RuntimeError after `scale_`: scaled and unscaled gradients do not mix."""
        if self._factor is not None:
            raise RuntimeError("gradients came after a scaling (clip); step and clear first")
        self._parts.append(grad if self._skip_row is None else _without(grad, self._skip_row))

    def clear(self) -> None:
        self._parts.clear()
        self._factor = None

    def __bool__(self) -> bool:
        return any(part.rows_N.numel() for part in self._parts)

    def rows(self) -> Tensor:
        """Rows of all entries; one may repeat."""
        return torch.cat([part.rows_N for part in self._parts])

    def coalesced(self, num_rows: int) -> LookupGrad | None:
        """One entry for each touched row of a storage of `num_rows`, rows ascending and scaled; None if no row was touched."""
        if not self:
            return None
        self._parts = [LookupGrad.merged(self._parts).coalesced(num_rows)]
        if self._factor is not None:
            self._parts[0].grad_GD.mul_(self._factor)
            self._factor = None
        return self._parts[0]

    def scale_(self, factor: float | Tensor) -> None:
        """Multiply all gradients, as clipping by norm does."""
        if self:
            own = torch.as_tensor(factor, dtype=torch.float32, device=self._parts[0].grad_GD.device)
            self._factor = own if self._factor is None else self._factor * own

    def apply(
        self,
        weight_RD: Tensor,
        state: list[Tensor],
        first_row_T: Tensor,
        lr_T: Tensor,
        optimizer: RowOptimizer,
        *,
        kernel: str = registry.AUTO,
    ) -> None:
        """Update the touched rows of a storage and their state in place; the gradients stay until `clear`."""
        if self:
            LookupGrad.merged(self._parts).apply(weight_RD, state, first_row_T, lr_T, optimizer, grad_scale=self._factor, kernel=kernel)


def _without(grad: LookupGrad, row: int) -> LookupGrad:
    own_N = grad.rows_N != row
    if bool(own_N.all()):
        return grad
    place_K = own_N.nonzero().squeeze(1)
    grad_rows = place_K.to(torch.int32) if grad.grad_row_N is None else grad.grad_row_N[place_K]
    return LookupGrad(grad.grad_GD, grad.rows_N[place_K], grad_rows, None if grad.scale_N is None else grad.scale_N[place_K])
