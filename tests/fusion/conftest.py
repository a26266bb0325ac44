"""Random lookups and entries for the operators' tests, and float64 answers to hold them against."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

# It runs in an environment of its own, where triton-ascend stands in the place of triton.
collect_ignore = ["ascend_lower.py"]


@dataclass(frozen=True)
class Lookup:
    """Arguments of one pooled lookup, drawn at random."""

    weight_RD: Tensor
    rows_N: Tensor
    offsets: Tensor | None
    num_features: int
    sample_weight_N: Tensor | None
    mean_F: Tensor | None
    feature_major: bool

    @property
    def options(self) -> dict[str, object]:
        return {"sample_weight_N": self.sample_weight_N, "mean_F": self.mean_F, "feature_major": self.feature_major}


# Each combination of types is compiled once, so they are listed, not drawn freely:
# dim, table, rows, offsets (None: one id a bag), sample weights, means.
LOOKUP_VARIANTS = (
    (16, torch.float32, torch.int32, None, False, False),
    (16, torch.float32, torch.int64, torch.int64, False, False),
    (16, torch.float32, torch.int32, torch.int64, True, True),
    (16, torch.float16, torch.int32, torch.int32, False, True),
    (16, torch.bfloat16, torch.int32, torch.int64, True, False),
    (1, torch.float32, torch.int32, None, True, False),
    (3, torch.float32, torch.int32, torch.int64, False, True),
    (3, torch.float16, torch.int32, None, False, False),
    (10, torch.bfloat16, torch.int64, torch.int64, False, False),
    (5, torch.float32, torch.int32, torch.int64, False, True),
    (7, torch.float32, torch.int32, torch.int64, False, True),
    (15, torch.float16, torch.int32, None, False, False),
    (17, torch.bfloat16, torch.int64, torch.int64, False, False),
    (100, torch.float16, torch.int32, torch.int64, True, True),
)


@st.composite
def lookups(draw: st.DrawFn, variants: tuple[tuple[object, ...], ...] = LOOKUP_VARIANTS) -> Lookup:
    dim, table, row_type, offset_type, weighted, mean = draw(st.sampled_from(variants))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_features, num_bags = draw(st.integers(1, 5)), draw(st.integers(0, 40))
    num_rows = draw(st.sampled_from([1, 2, 7, 300, 5000]))
    count = num_features * num_bags
    offsets = None
    num_ids = count
    if offset_type is not None:
        longest = draw(st.sampled_from([0, 1, 3, 20]))
        lengths = torch.randint(0, longest + 1, (count,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(offset_type)
        num_ids = int(offsets[-1])
    hot = draw(st.sampled_from([num_rows, num_rows, 1, 3]))
    return Lookup(
        torch.randn(num_rows, dim, generator=generator).to(table),
        torch.randint(0, min(hot, num_rows), (num_ids,), generator=generator).to(row_type),
        offsets,
        num_features,
        torch.randn(num_ids, generator=generator) if weighted else None,
        torch.rand(num_features, generator=generator) < 0.5 if mean else None,
        draw(st.booleans()),
    )


@pytest.fixture(scope="session")
def random_lookups() -> Callable[..., st.SearchStrategy[Lookup]]:
    """Strategy of pooled lookups, of all variants or of those given."""
    return lookups


@pytest.fixture(params=[1, 2, 5], ids="threads={}".format)
def num_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of threads that kernels take, however small the work."""
    from ninerank.fusion.kernels import threads

    monkeypatch.setattr(threads, "num_threads_for", lambda num_elements: request.param)
    return int(request.param)
