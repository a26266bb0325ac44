"""All embedding tables of a model and the lookup of a batch.

Shape legend: B scored rows, Fd dense features, Fs pooled fields, L sequence length, D embedding dim of a group.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ninerank.config import Config
from ninerank.embedding.index import BatchIndex
from ninerank.embedding.rows import SideRows
from ninerank.embedding.table import TableGroup, TableLayout
from ninerank.errors import DataError, SpecError
from ninerank.features.batch import Batch, Block
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature, Side

__all__ = ["EmbeddingCollection", "EmbeddingConfig", "pooled_keys"]

SIDES: tuple[Side, ...] = ("request", "item")


class EmbeddingConfig(Config):
    """How tables are initialised, trained and padded.

    mode: `sparse` updates touched rows alone (a sparse optimizer does it); `dense` makes every table an ordinary parameter with a
    gradient of its full size, as the published reference results need. init_std: rows start from N(0, init_std^2).
    l2: lambda of `(lambda / 2) * ||E||^2` over the whole tables, each step; dense mode alone. sequence_length: sequences are padded
    to the `longest` in the batch, or to their `max` (static shapes).
    """

    mode: Literal["dense", "sparse"] = "sparse"
    init_std: float = Field(default=0.01, ge=0.0, allow_inf_nan=False)
    l2: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    sequence_length: Literal["longest", "max"] = "longest"

    @model_validator(mode="after")
    def _l2_needs_dense(self) -> Self:
        if self.l2 > 0 and self.mode == "sparse":
            raise ValueError("l2 over whole tables needs mode 'dense'; in mode 'sparse' give the optimizer a weight_decay (touched rows)")
        return self


def pooled_keys(spec: FeatureSpec) -> tuple[str, ...]:
    """Names of the pooled fields, in the order of the collection's output: per side single ids, then bags; request side first."""
    return tuple(key for side in SIDES for key in (*spec.single_keys(side), *spec.bag_keys(side)))


class EmbeddingCollection(nn.Module):
    """Merged tables of every group and the lookup that turns a batch into a tower's inputs.

    spec: a fitted spec. groups: dim of each group, e.g. `{"deep": 16, "linear": 1}`; every group holds every table.
    The start values depend on seed, group and table name alone. Raises SpecError for a spec that is not fitted.
    """

    def __init__(self, spec: FeatureSpec, groups: Mapping[str, int], config: EmbeddingConfig, *, seed: int) -> None:
        super().__init__()
        if not spec.is_fitted:
            raise SpecError("the feature spec is not fitted: vocabularies and table sizes are unknown; fit it on training data first")
        self.config = config
        self.layout = TableLayout.of({name: table.num_rows for name, table in spec.tables.items()})
        table_of = {feature: name for name, table in spec.tables.items() for feature in table.features}
        self.request, self.item = (self._side(spec, side, table_of) for side in SIDES)
        self.groups = nn.ModuleDict(
            {
                name: TableGroup.drawn(name, self.layout, dim, sparse=config.mode == "sparse", init_std=config.init_std, seed=seed)
                for name, dim in groups.items()
            }
        )

    @classmethod
    def of_tables(cls, spec: FeatureSpec, tables: Mapping[str, Tensor], config: EmbeddingConfig) -> Self:
        """Collection over given storages (V, D), one a group, which it shares; raises SpecError where V is not the spec's."""
        collection = cls(spec, {}, config, seed=0)
        for name, storage_VD in tables.items():
            if storage_VD.dim() != 2 or storage_VD.shape[0] != collection.layout.total_rows:
                raise SpecError(f"group {name!r}: storage is {tuple(storage_VD.shape)}, the spec needs {collection.layout.total_rows} rows")
            collection.groups[name] = TableGroup(name, collection.layout, storage_VD, sparse=config.mode == "sparse")
        return collection

    def _side(self, spec: FeatureSpec, side: Side, table_of: Mapping[str, str]) -> SideRows:
        def tables(keys: tuple[str, ...]) -> dict[str, str]:
            return {key: table_of[key] for key in keys}

        own = [feature for feature in spec.features if feature.side == side]
        return SideRows(
            self.layout,
            tables(spec.single_keys(side)),
            tables(spec.bag_keys(side)),
            tables(spec.sequence_keys(side)),
            mean_bags=[f.name for f in own if isinstance(f, IdFeature) and f.multi and f.pooling == "mean"],
            max_lengths={f.name: f.max_length for f in own if isinstance(f, SequenceFeature)},
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """A tower's inputs: "dense" (B, Fd); per group "<group>" (B, Fs, D) and "<group>.seq.<name>" (B, L, D); "mask.<name>" (B, L).

        Request features come first, then item features; pooled fields are in the order of `pooled_keys`. In a rank call the
        request side is looked up once per request and repeated per candidate afterwards. Ids are checked where they lie on
        the host; call `check` before moving a batch elsewhere. Raises DataError.
        """
        if batch.item.dense_RF.device.type == "cpu":
            self.check(batch)
        index = BatchIndex(self.request, self.item, batch, pad_to_max=self.config.sequence_length == "max")
        dense_request, dense_item = batch.request.dense_RF, batch.item.dense_RF
        if batch.user_row_B is not None:
            dense_request = dense_request.index_select(0, batch.user_row_B)
        inputs = {"dense": torch.cat([dense_request, dense_item], dim=1)}
        for name, group in self.named_groups():
            inputs[name], sequences = index.assemble(group.rows(index.row_N))
            inputs.update({f"{name}.seq.{key}": rows_BLD for key, rows_BLD in sequences.items()})
        inputs.update({f"mask.{key}": mask for key, mask in index.masks().items()})
        return inputs

    def check(self, batch: Batch) -> None:
        """Raise DataError for an id outside its table, other features than the spec's, or sides that do not fit together."""
        num_requests, num_rows, user_row_B = batch.request.num_rows, batch.item.num_rows, batch.user_row_B
        if user_row_B is None:
            if num_requests != num_rows:
                raise DataError(f"batch has {num_requests} request rows and {num_rows} item rows, but no user_row_B")
        elif user_row_B.numel() != num_rows:
            raise DataError(f"user_row_B names a request row for {user_row_B.numel()} candidates, the batch has {num_rows}")
        elif num_rows and not 0 <= int(user_row_B.min()) <= int(user_row_B.max()) < num_requests:
            raise DataError(f"user_row_B spans {int(user_row_B.min())} to {int(user_row_B.max())}, request rows 0 to {num_requests - 1}")
        sides: tuple[tuple[SideRows, Block], ...] = ((self.request, batch.request), (self.item, batch.item))
        for side, block in sides:
            side.check(block)

    def named_groups(self) -> list[tuple[str, TableGroup]]:
        return [(name, group) for name, group in self.groups.items() if isinstance(group, TableGroup)]

    def l2_penalty(self) -> Tensor:
        """(l2 / 2) * ||E||^2 over all rows of all tables of all groups; a scalar."""
        if self.config.l2 == 0:
            return torch.zeros((), device=self.named_groups()[0][1].storage.device)
        squares = [group.storage.square().sum() for _, group in self.named_groups()]
        return torch.stack(squares).sum() * (self.config.l2 / 2)
