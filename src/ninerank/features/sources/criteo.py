"""The Criteo Kaggle log: tab-separated lines of a label, 13 counts and 26 hashed categories, an empty field being a missing value.

Columns are named label, I1 .. I13, C1 .. C26. Counts may be negative (I2 is, in a few rows).
"""

from ninerank.features.files import Dialect
from ninerank.features.spec import Bucketize, FeatureSpec, Hashed, IdFeature, Log, NumericFeature, Vocabulary

__all__ = ["CATEGORIES", "COLUMNS", "COUNTS", "DIALECT", "criteo_spec"]

COUNTS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *COUNTS, *CATEGORIES)
DIALECT = Dialect(delimiter="\t", quoted=False, header=COLUMNS)


def criteo_spec(*, num_buckets: int | None = None, min_count: int = 10, count_buckets: int | None = None) -> FeatureSpec:
    """A spec of the raw log: hashed categories with `num_buckets`, else a vocabulary of those seen `min_count` times.

    Counts are log-scaled, or cut into `count_buckets` quantile buckets. The log does not say what describes the user and what the ad:
    all have role item, so that a raw row is a candidate and nothing is taken to be shared by a request.

    >>> spec = criteo_spec(num_buckets=1000)
    >>> len(spec.single_keys("item")), len(spec.dense_keys("item")), spec.is_fitted
    (26, 13, True)
    """
    transform = Log() if count_buckets is None else Bucketize(num_buckets=count_buckets)
    encoding = Vocabulary(min_count=min_count) if num_buckets is None else Hashed(num_buckets=num_buckets)
    counts = tuple(NumericFeature(name=name, role="item", transform=transform) for name in COUNTS)
    categories = tuple(IdFeature(name=name, role="item", encoding=encoding) for name in CATEGORIES)
    return FeatureSpec(labels=("label",), features=(*counts, *categories))
