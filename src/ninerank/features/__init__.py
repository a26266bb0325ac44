"""Features: the spec of a log's columns, its fitting, and the transform that training and serving share.

    spec.py        what each column becomes           fit.py      vocabularies, moments and boundaries from a sample
    reader.py      files -> Arrow record batches      transform.py  record batches -> batch.Batch (hashing, vocabulary, kernels below it)
    sources/       formats of public logs, and a synthetic log with a known ground truth

Names are imported when first used: `import ninerank.features` loads neither torch nor numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ninerank.features.batch import Batch, Block, Jagged, KeyedJagged
    from ninerank.features.reader import Reader
    from ninerank.features.spec import FeatureSpec, IdFeature, NumericFeature, SequenceFeature, TableSpec
    from ninerank.features.transform import Transform

_MODULE_OF = {
    **dict.fromkeys(("Batch", "Block", "Jagged", "KeyedJagged"), "batch"),
    **dict.fromkeys(("FeatureSpec", "IdFeature", "NumericFeature", "SequenceFeature", "TableSpec"), "spec"),
    "Reader": "reader",
    "Transform": "transform",
}

__all__ = [
    "Batch",
    "Block",
    "FeatureSpec",
    "IdFeature",
    "Jagged",
    "KeyedJagged",
    "NumericFeature",
    "Reader",
    "SequenceFeature",
    "TableSpec",
    "Transform",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
