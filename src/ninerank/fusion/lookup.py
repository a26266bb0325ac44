"""Lookups whose gradient goes to a fused optimizer and not into a dense tensor as large as the tables.

`pooled` and `sequence` look rows up as `embedding_bag` and `embedding_sequence` do, `looked_up` ids as `embedding_lookup`
does. Where gradients are recorded and the storage requires them, the backward pass hands a `LookupGrad` to `on_grad` and
leaves `weight.grad` alone. The caller either applies it there and then (the optimizer runs inside backward) or keeps it for its step:

    pending = []
    out = pooled(weight, rows, offsets, num_features, on_grad=pending.append)
    loss(out).backward()
    update = LookupGrad.merged(pending)                 # rows that two lookups share are summed once
    update.apply(weight, state, first_row_T, lr_T, RowwiseAdagrad())

Shapes as in `embedding_bag`: N ids, G outputs, R rows, D embedding dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ninerank.fusion.kernels import registry
from ninerank.fusion.kernels.embedding_bag import embedding_bag
from ninerank.fusion.kernels.embedding_bag.entries import bag_entries
from ninerank.fusion.kernels.embedding_lookup import embedding_lookup
from ninerank.fusion.kernels.embedding_reduce import embedding_reduce
from ninerank.fusion.kernels.embedding_sequence import embedding_sequence, sequence_entries
from ninerank.fusion.kernels.embedding_update import RowOptimizer, embedding_update

__all__ = ["LookupGrad", "looked_up", "pooled", "sequence"]


@dataclass(frozen=True)
class LookupGrad:
    """Gradient of one or more lookups in one storage, entry by entry: row_n gets scale_n * grad[grad_row_n].

    grad_GD: float32 (G, D). rows_N: int32 or int64. grad_row_N: int32, None for n itself. scale_N: float32, None for 1.
    """

    grad_GD: Tensor
    rows_N: Tensor
    grad_row_N: Tensor | None = None
    scale_N: Tensor | None = None

    @staticmethod
    def merged(parts: Sequence["LookupGrad"]) -> "LookupGrad":
        """All entries of several lookups in one storage; ValueError without any."""
        if not parts:
            raise ValueError("no lookup has a gradient to merge")
        if len(parts) == 1:
            return parts[0]
        device, base, grad_rows, scales = parts[0].rows_N.device, 0, [], []
        for part in parts:
            own = torch.arange(len(part.rows_N), dtype=torch.int32, device=device) if part.grad_row_N is None else part.grad_row_N
            grad_rows.append(own + base)
            scales.append(torch.ones(len(own), device=device) if part.scale_N is None else part.scale_N)
            base += part.grad_GD.shape[0]
        scale_N = None if all(part.scale_N is None for part in parts) else torch.cat(scales)
        return LookupGrad(
            torch.cat([part.grad_GD for part in parts]), torch.cat([part.rows_N for part in parts]), torch.cat(grad_rows), scale_N
        )

    def coalesced(self, num_rows: int, *, kernel: str = registry.AUTO) -> "LookupGrad":
        """One entry for each touched row, rows ascending: `grad_GD.norm()` is then the gradient's norm."""
        rows_U, sums_UD = embedding_reduce(self.grad_GD, self.rows_N, self.grad_row_N, self.scale_N, num_rows, kernel=kernel)
        return LookupGrad(sums_UD, rows_U)

    def apply(
        self,
        weight_RD: Tensor,
        state: list[Tensor],
        first_row_T: Tensor,
        lr_T: Tensor,
        optimizer: RowOptimizer,
        *,
        grad_scale: Tensor | None = None,
        kernel: str = registry.AUTO,
    ) -> None:
        """Update the touched rows and their state in place, by `embedding_update`."""
        embedding_update(
            *(weight_RD, state, self.grad_GD, self.rows_N, first_row_T, lr_T, optimizer),
            grad_row_N=self.grad_row_N,
            scale_N=self.scale_N,
            grad_scale=grad_scale,
            kernel=kernel,
        )


def pooled(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    num_features: int,
    *,
    on_grad: Callable[[LookupGrad], None],
    sample_weight_N: Tensor | None = None,
    mean_F: Tensor | None = None,
    feature_major: bool = False,
    kernel: str = registry.AUTO,
) -> Tensor:
    """`embedding_bag` whose gradient goes to `on_grad`; sample weights are constants here."""
    out = embedding_bag(
        *(weight_RD.detach(), rows_N, offsets, num_features),
        sample_weight_N=None if sample_weight_N is None else sample_weight_N.detach(),
        mean_F=mean_F,
        feature_major=feature_major,
        kernel=kernel,
    )
    return _tapped_bags(weight_RD, out, rows_N, offsets, num_features, sample_weight_N, mean_F, feature_major, on_grad)


def looked_up(
    weight_RD: Tensor,
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    *,
    on_grad: Callable[[LookupGrad], None],
    policy_F: Tensor | None = None,
    sample_weight_N: Tensor | None = None,
    mean_F: Tensor | None = None,
    feature_major: bool = False,
    names: Sequence[str] | None = None,
    kernel: str = registry.AUTO,
) -> Tensor:
    """`embedding_lookup` of ids on the host, whose gradient goes to `on_grad`: the same as `embedding_rows` and `pooled`, in one pass."""
    sample_weight_N = None if sample_weight_N is None else sample_weight_N.detach()
    out, rows_N = embedding_lookup(
        *(weight_RD.detach(), values_N, offsets, first_row_F, num_rows_F),
        policy_F=policy_F,
        sample_weight_N=sample_weight_N,
        mean_F=mean_F,
        feature_major=feature_major,
        names=names,
        kernel=kernel,
    )
    return _tapped_bags(weight_RD, out, rows_N, offsets, first_row_F.numel(), sample_weight_N, mean_F, feature_major, on_grad)


def sequence(
    weight_RD: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None = None,
    max_length: int = 0,
    *,
    on_grad: Callable[[LookupGrad], None],
    kernel: str = registry.AUTO,
) -> Tensor:
    """`embedding_sequence` whose gradient goes to `on_grad`."""
    out = embedding_sequence(weight_RD.detach(), rows_N, offsets, max_length, kernel=kernel)

    def receive(grad: Tensor) -> None:
        entries_N = None if offsets is None else sequence_entries(offsets, max_length, rows_N.numel())
        on_grad(LookupGrad(grad.reshape(-1, grad.shape[-1]), rows_N, entries_N))

    return _tapped(weight_RD, out, receive)


def _tapped_bags(
    weight_RD: Tensor,
    out: Tensor,
    rows_N: Tensor,
    offsets: Tensor | None,
    num_features: int,
    sample_weight_N: Tensor | None,
    mean_F: Tensor | None,
    feature_major: bool,
    on_grad: Callable[[LookupGrad], None],
) -> Tensor:
    def receive(grad: Tensor) -> None:
        entries_N, scale_N = bag_entries(rows_N.numel(), offsets, sample_weight_N, mean_F, num_features, feature_major, rows_N.device)
        on_grad(LookupGrad(grad.reshape(-1, grad.shape[-1]), rows_N, entries_N, scale_N))

    return _tapped(weight_RD, out, receive)


def _tapped(weight_RD: Tensor, out: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    if not (torch.is_grad_enabled() and weight_RD.requires_grad):
        return out
    tapped: Tensor = _Tap.apply(weight_RD, out, receive)  # type: ignore[no-untyped-call]
    return tapped


class _Tap(torch.autograd.Function):
    """Puts the output on the tape of a storage that takes no gradient itself."""

    @staticmethod
    def forward(ctx: Any, weight_RD: Tensor, out: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        ctx.receive = receive
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.receive(grad)
        return None, None, None
