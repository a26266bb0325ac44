"""How a tower's inputs become fields: pooled ids as they are, sequences by their mean, numbers times a learned vector.

Shape legend: B scored rows, F fields, Fd dense numbers, D embedding dim, L sequence length, T tasks, I width of a flat input.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ninerank.embedding.pooling import pool_rows
from ninerank.towers.model import TowerShape

__all__ = ["FieldStack", "FlatInput", "LinearTerm", "history_mean", "masked_mean"]

Inputs = Mapping[str, Tensor]


def masked_mean(rows_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean (B, D) of the rows that the mask keeps; zeros where it keeps none."""
    kept_BL1 = mask_BL.to(rows_BLD.dtype).unsqueeze(2)
    return (rows_BLD * kept_BL1).sum(1) / kept_BL1.sum(1).clamp(min=1)


def history_mean(inputs: Inputs, group: str, name: str) -> Tensor:
    """Mean (B, D) of sequence `name`'s rows in `group`, be they padded or jagged; zeros where there are none."""
    rows = inputs[f"{group}.seq.{name}"]
    if f"offsets.{name}" in inputs:
        mean_F = torch.ones(1, dtype=torch.bool, device=rows.device)
        return pool_rows(rows, inputs[f"offsets.{name}"], 1, mean_F).squeeze(1)
    return masked_mean(rows, inputs[f"mask.{name}"])


class FieldStack(nn.Module):
    """Fields (B, F, D) of one embedding group: pooled ids; with `numbers` x_j v_j for each number x_j; the mean of each sequence.

    The learned vectors v_j let a number take part in crosses as an id does: <x_i v_i, x_j v_j> = x_i x_j <v_i, v_j> (Rendle,
    Factorization Machines, ICDM 2010).
    """

    def __init__(self, shape: TowerShape, group: str, dim: int, *, numbers: bool, sequences: bool = True) -> None:
        super().__init__()
        self.group = group
        self.sequences = tuple(s.name for s in shape.sequences) if sequences else ()
        num_vectors = shape.num_dense if numbers else 0
        self.num_fields = shape.num_fields + num_vectors + len(self.sequences)
        self.vector_FD = nn.Parameter(torch.randn(num_vectors, dim) * 0.01) if num_vectors else None

    def forward(self, inputs: Inputs) -> Tensor:
        parts = [inputs[self.group]]
        if self.vector_FD is not None:
            parts.append(inputs["dense"].unsqueeze(2) * self.vector_FD)
        parts += [history_mean(inputs, self.group, name).unsqueeze(1) for name in self.sequences]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class FlatInput(nn.Module):
    """x (B, I): pooled ids and sequence means side by side, then the numbers as they are."""

    def __init__(self, shape: TowerShape, dim: int, *, sequences: bool = True) -> None:
        super().__init__()
        self.fields = FieldStack(shape, "deep", dim, numbers=False, sequences=sequences)
        self.num_dense = shape.num_dense
        self.width = self.fields.num_fields * dim + shape.num_dense

    def forward(self, inputs: Inputs) -> Tensor:
        fields_BI = self.fields(inputs).flatten(1)
        return torch.cat([fields_BI, inputs["dense"]], dim=1) if self.num_dense else fields_BI


class LinearTerm(nn.Module):
    """b + sum_f w_f (B, T): one weight per id and task, per number, and the mean weight of a sequence's ids."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fields = FieldStack(shape, "linear", shape.num_tasks, numbers=True)
        self.bias_T = nn.Parameter(torch.zeros(shape.num_tasks))

    def forward(self, inputs: Inputs) -> Tensor:
        out: Tensor = self.fields(inputs).sum(1) + self.bias_T
        return out
