"""Compiled kernels are found again by the next process, and stale ones are not."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ninerank.fusion.kernels import jit as module
from ninerank.fusion.kernels.jit import as_numpy, fixed_dim, jit, jit_for, rows_ahead

ROOT = Path(__file__).parents[2]
LOOKUP = """
import torch
from ninerank.fusion.kernels.embedding_bag import embedding_bag
for dim in (8, 16):
    embedding_bag(torch.zeros(4, dim), torch.zeros(3, dtype=torch.int32), None, 1, kernel="numba")
"""


def _cached(folder: Path) -> tuple[int, int]:
    """Kernels loaded from and saved to `folder` by one process that looks two tables up."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "NUMBA_DEBUG_CACHE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", LOOKUP], check=True, capture_output=True, text=True, env=environment, timeout=120)
    return tuple(len(re.findall(rf"data {what} '.*drive", done.stdout)) for what in ("loaded from", "saved to"))  # type: ignore[return-value]


def test_the_next_process_compiles_nothing_but_what_is_damaged(tmp_path: Path) -> None:
    assert _cached(tmp_path) == (0, 2)
    index, _ = (file for file in tmp_path.rglob("*.nbi") if "drive" in file.name)
    code = next(file for file in tmp_path.rglob("*.nbc") if "drive" in file.name and not file.name.startswith(index.stem))
    assert _cached(tmp_path) == (2, 0)
    index.write_bytes(b"")
    code.write_bytes(code.read_bytes()[:50])
    assert _cached(tmp_path) == (0, 2)


def test_every_kernel_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x):  # type: ignore[no-untyped-def]
        return x

    def name(value: object, *made_for: object) -> str:
        compiled = jit_for(*made_for)(function)
        compiled(value)  # type: ignore[no-untyped-call]
        (signature,) = compiled.overloads  # type: ignore[attr-defined]
        return str(compiled._cache._file_of(signature, compiled.targetctx.codegen())._index_name)  # type: ignore[attr-defined]

    first = name(1, 16, torch.float32)
    assert name(1, 16, torch.float32) == first
    others = {first, name(1, 8, torch.float32), name(1, 16, torch.float16), name(1.0, 16, torch.float32)}
    monkeypatch.setattr(module, "_sources", lambda: "of another version")
    others.add(name(1, 16, torch.float32))
    assert len(others) == 5


def test_without_a_folder_for_the_cache_kernels_still_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(function: object, made_for: object) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.setattr(module, "_Cache", refuse)
    module._warn_of_no_cache.cache_clear()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        doubled = [jit(lambda x: 2 * x)(21) for _ in range(2)]
    assert doubled == [42, 42]
    assert [record.getMessage() for record in caplog.records] == [
        "no folder for compiled kernels can be written; this process compiles its own (NUMBA_CACHE_DIR names a folder)"
    ]


@pytest.mark.parametrize(("dim", "fixed"), [(1, 1), (4, 4), (16, 16), (100, 100), (256, 256), (3, 0), (15, 0), (17, 0), (260, 0)])
def test_dims_with_a_kernel_of_their_own(dim: int, fixed: int) -> None:
    assert fixed_dim(dim) == fixed


@pytest.mark.parametrize(("row_bytes", "rows"), [(1, 32), (64, 32), (256, 16), (1024, 4), (100_000, 4)])
def test_prefetch_stays_in_the_first_cache(row_bytes: int, rows: int) -> None:
    assert rows_ahead(row_bytes) == rows


def test_arrays_are_views_and_contiguous() -> None:
    weight = torch.zeros(2, 3, dtype=torch.bfloat16)
    as_numpy(weight)[1, 2] = 0x3F80
    assert weight[1, 2] == 1
    with pytest.raises(AssertionError):
        as_numpy(weight.t())
