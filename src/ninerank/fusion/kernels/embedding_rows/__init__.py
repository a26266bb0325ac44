"""Ids of features -> rows of one merged storage, with bounds kept.

All tables of a group live in one storage of R rows; feature f's table starts at row `first_row_F[f]` and has
`num_rows_F[f]` rows. For the n-th id, of feature f:

    row_n = first_row_F[f] + id_n                     where 0 <= id_n < num_rows_F[f]
    else, by `policy_F[f]`:  ERROR   IdRangeError with feature, id and size; nothing is returned
                             CLAMP   the nearest valid id
                             DEFAULT row 0 of the table, the default row

values_N: int32 or int64, feature by feature. offsets: integer (F * B + 1,) start of each (feature, bag), or None where
every bag holds one id (N = F * B). first_row_F, num_rows_F: int64. policy_F: uint8, or None for ERROR everywhere.
Returns int32 (N,), int64 where the storage has 2^31 rows or more. Ids are mapped where they are; Ascend compares int64
as slow scalar code and CUDA must wait for an ERROR check, so map them on the host before they are copied.
Kernels: numba (cpu), torch (everywhere). Deterministic.

F features, B bags a feature, N ids, R rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import torch
from torch import Tensor

from ninerank.errors import DataError
from ninerank.fusion.kernels import registry

__all__ = ["IdRangeError", "OutOfRange", "check", "embedding_rows", "naming", "reference", "row_dtype"]

MAX_INT32_ROWS = 2**31


class OutOfRange(IntEnum):
    """What becomes of an id that its table does not have."""

    ERROR = 0
    CLAMP = 1
    DEFAULT = 2


class IdRangeError(DataError):
    """An id is outside its table."""

    def __init__(self, feature: int, id_: int, num_rows: int, position: int, name: str | None = None) -> None:
        what = f"feature {name!r}" if name is not None else f"feature number {feature}"
        super().__init__(
            f"{what}: id {id_} (number {position} of the batch) is outside its table of {num_rows} rows; allowed: 0 to {num_rows - 1}"
        )
        self.feature, self.id, self.num_rows, self.position = feature, id_, num_rows, position

    def named(self, name: str) -> "IdRangeError":
        """The same error with the feature's name in its message."""
        return IdRangeError(self.feature, self.id, self.num_rows, self.position, name)


def embedding_rows(
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    policy_F: Tensor | None,
    num_storage_rows: int,
    *,
    names: Sequence[str] | None = None,
    kernel: str = registry.AUTO,
) -> Tensor:
    """Rows (N,) of the merged storage; see the module's contract. `names` of the F features make errors readable.

    >>> values, first, size = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 3]), torch.tensor([3, 2])
    >>> embedding_rows(values, None, first, size, None, 5)
    tensor([0, 2, 4, 4], dtype=torch.int32)
    >>> embedding_rows(values + 1, None, first, size, None, 5, names=("user", "item"))
    Traceback (most recent call last):
    ...
    ninerank.fusion.kernels.embedding_rows.IdRangeError: feature 'user': id 3 (number 1 of the batch) is outside
    its table of 3 rows; allowed: 0 to 2
    """
    run = _map if registry.is_plain(values_N) else _operator
    with naming(names):
        rows_N: Tensor = run(values_N, offsets, first_row_F, num_rows_F, policy_F, num_storage_rows, kernel)
    return rows_N


@contextmanager
def naming(names: Sequence[str] | None) -> Iterator[None]:
    """Errors of ids within name their feature, where names are given."""
    try:
        yield
    except IdRangeError as error:
        if names is None:
            raise
        raise error.named(names[error.feature]) from None


def row_dtype(num_storage_rows: int) -> torch.dtype:
    """Integer type of the rows of a storage: int32 while it can hold them."""
    return torch.int32 if num_storage_rows < MAX_INT32_ROWS else torch.int64


def reference(
    values_N: Tensor, offsets: Tensor | None, first_row_F: Tensor, num_rows_F: Tensor, policy_F: Tensor | None, num_storage_rows: int
) -> Tensor:
    """The contract in plain torch operators."""
    num_features = first_row_F.numel()
    if offsets is None:
        counts_F = torch.full_like(first_row_F, values_N.numel() // num_features)
    else:
        counts_F = (
            offsets[:: (offsets.numel() - 1) // num_features].diff().to(first_row_F.dtype)
            if offsets.numel() > 1
            else torch.zeros_like(first_row_F)
        )
    feature_N = torch.repeat_interleave(torch.arange(num_features, device=values_N.device), counts_F, output_size=values_N.numel())
    id_N, size_N = values_N.to(torch.int64), num_rows_F[feature_N]
    outside_N = (id_N < 0) | (id_N >= size_N)
    policy_N = torch.zeros_like(feature_N) if policy_F is None else policy_F.to(torch.int64)[feature_N]
    refused_N = outside_N & (policy_N == OutOfRange.ERROR)
    if bool(refused_N.any()):
        position = int(refused_N.to(torch.int32).argmax())
        raise IdRangeError(int(feature_N[position]), int(id_N[position]), int(size_N[position]), position)
    clamped_N = torch.minimum(id_N.clamp(min=0), size_N - 1)
    id_N = torch.where(outside_N, torch.where(policy_N == OutOfRange.CLAMP, clamped_N, 0), id_N)
    return (id_N + first_row_F[feature_N]).to(row_dtype(num_storage_rows))


def _map(
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    policy_F: Tensor | None,
    num_storage_rows: int,
    kernel: str = registry.AUTO,
) -> Tensor:
    check(values_N, offsets, first_row_F, num_rows_F, policy_F)
    run = registry.choose("embedding_rows", values_N.device.type, kernel)
    rows_N: Tensor = run(values_N, offsets, first_row_F, num_rows_F, policy_F, num_storage_rows)
    return rows_N


_operator = torch.library.custom_op("ninerank::embedding_rows", _map, mutates_args=())


@_operator.register_fake
def _fake(
    values_N: Tensor,
    offsets: Tensor | None,
    first_row_F: Tensor,
    num_rows_F: Tensor,
    policy_F: Tensor | None,
    num_storage_rows: int,
    kernel: str = registry.AUTO,
) -> Tensor:
    return torch.empty_like(values_N, dtype=row_dtype(num_storage_rows))


def check(values_N: Tensor, offsets: Tensor | None, first_row_F: Tensor, num_rows_F: Tensor, policy_F: Tensor | None) -> None:
    """Raise ValueError or TypeError for arguments that do not fit together."""
    num_features = first_row_F.numel()
    if num_features == 0 or num_rows_F.numel() != num_features or (policy_F is not None and policy_F.numel() != num_features):
        sizes = (num_features, num_rows_F.numel(), num_features if policy_F is None else policy_F.numel())
        raise ValueError(f"first_row_F, num_rows_F and policy_F hold {sizes} features; one number above 0 is needed")
    if values_N.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids are {values_N.dtype}; allowed: torch.int32, torch.int64")
    bags = values_N.numel() if offsets is None else offsets.numel() - 1
    if bags < 0 or bags % num_features:
        raise ValueError(f"{bags} bags do not share out over {num_features} features")


for _kernel in (
    registry.Kernel("embedding_rows", "numba", f"{__name__}.cpu", "run", ("cpu",), "numba"),
    registry.Kernel("embedding_rows", "torch", __name__, "reference"),
):
    registry.register(_kernel)
