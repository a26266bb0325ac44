"""Deep interest network: each history is summed with weights that depend on the candidate.

    logit = MLP([e_1, ..., e_F, x, u_1, ..., u_S])          u_s = sum_j a(k_j, q_s) k_j

k_j are the ids of sequence s, q_s the embedding of the field it is a history of, and a the attention unit of
`blocks.attention.TargetAttention`. Zhou et al., Deep Interest Network for Click-Through Rate Prediction, KDD 2018.
With `attention: mean` u_s is the plain mean of the history: the ablation that shows what the attention brings. All other parameters
are the same, and for one seed start from the same values.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ninerank.errors import SpecError
from ninerank.towers.blocks.attention import TargetAttention
from ninerank.towers.blocks.fields import FlatInput, history_mean
from ninerank.towers.blocks.mlp import MLP
from ninerank.towers.config import DINConfig
from ninerank.towers.model import TowerShape

__all__ = ["DIN"]


class DIN(nn.Module):
    """Logits (B, T) from the `deep` group; raises SpecError for a spec without a sequence."""

    def __init__(self, config: DINConfig, shape: TowerShape) -> None:
        super().__init__()
        if not shape.sequences:
            raise SpecError("model din: the spec has no sequence feature for it to attend to; add one (kind: sequence) or take dnn")
        dim = config.embedding_dim
        self.sequences = shape.sequences
        self.flat = FlatInput(shape, dim, sequences=False)
        self.mlp = MLP(self.flat.width + len(shape.sequences) * dim, config.mlp, shape.num_tasks)
        # Built last, so that the ablation draws the same start values for all else.
        self.attention = None
        if config.attention == "target":
            unit = partial(TargetAttention, dim, config.attention_hidden, config.attention_activation, softmax=config.softmax)
            self.attention = nn.ModuleList(unit() for _ in shape.sequences)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        parts = [self.flat(inputs)]
        for i, sequence in enumerate(self.sequences):
            if self.attention is None:
                parts.append(history_mean(inputs, "deep", sequence.name))
                continue
            unit, query_BD, keys = self.attention[i], inputs["deep"][:, sequence.target], inputs[f"deep.seq.{sequence.name}"]
            offsets = inputs.get(f"offsets.{sequence.name}")
            if offsets is None:
                parts.append(unit(query_BD, keys, inputs[f"mask.{sequence.name}"]))
            else:
                assert isinstance(unit, TargetAttention)
                parts.append(unit.jagged(query_BD, keys, offsets))
        logits_BT: Tensor = self.mlp(torch.cat(parts, dim=1))
        return logits_BT
