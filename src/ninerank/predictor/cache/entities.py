"""Which columns of a spec belong to an item or a user, and which of them is its id."""

import pyarrow as pa

from ninerank.features.columns import arrow_schema
from ninerank.features.spec import FeatureSpec, IdFeature, SequenceFeature

__all__ = ["default_item_key", "default_user_key", "entity_columns", "entity_schema"]

ITEM_ID_NAMES = ("item_id", "item")
USER_ID_NAMES = ("user_id", "user")


def default_item_key(spec: FeatureSpec) -> str | None:
    """Column that candidate ids stand for where nobody says: the item id of which the spec has sequences, else `item_id` or `item`."""
    single = [f for f in spec.features if isinstance(f, IdFeature) and f.side == "item" and not f.multi]
    targets = {f.of for f in spec.features if isinstance(f, SequenceFeature)}
    likely = [f.column for f in single if f.name in targets] + [f.column for name in ITEM_ID_NAMES for f in single if f.column == name]
    return likely[0] if likely else None


def default_user_key(spec: FeatureSpec) -> str | None:
    """Column by which users' features are looked up where nobody says: the user feature `user_id` or `user`."""
    single = {f.column for f in spec.features if isinstance(f, IdFeature) and f.role == "user" and not f.multi}
    return next((name for name in USER_ID_NAMES if name in single), None)


def entity_columns(spec: FeatureSpec, kind: str) -> pa.Schema:
    """Columns of features of role `item` or `user`, as a request has them; context belongs to no entity."""
    held = arrow_schema(spec, "item" if kind == "item" else "request")
    own = {feature.column for feature in spec.features if feature.role == kind}
    return pa.schema([field for field in held if field.name in own])


def entity_schema(spec: FeatureSpec, kind: str, key: str) -> pa.Schema:
    """What a store holds of an entity: its columns, and the key first where it is no feature, as strings."""
    columns = entity_columns(spec, kind)
    return columns if key in columns.names else pa.schema([pa.field(key, pa.string()), *columns])
