"""16-bit floats are converted as torch converts them, bit for bit."""

import numba
import pytest
import torch

from ninerank.fusion.kernels.jit import CODECS, as_numpy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decodes_every_bit_pattern(dtype: torch.dtype) -> None:
    decode = CODECS[dtype].decode

    @numba.njit
    def run(source, target):  # type: ignore[no-untyped-def]
        for i in range(source.size):
            target[i] = decode(source[i])

    stored, found = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype), torch.empty(65536)
    run(as_numpy(stored), as_numpy(found))
    expected = stored.float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encodes_with_rounding_to_nearest_even(dtype: torch.dtype) -> None:
    encode = CODECS[dtype].encode

    @numba.njit
    def run(source, target):  # type: ignore[no-untyped-def]
        for i in range(source.size):
            target[i] = encode(source[i])

    representable = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    halfway = (representable[:-1] + representable[1:]) / 2
    anything = (
        torch.randint(-(2**31), 2**31 - 1, (500_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32).view(torch.float32)
    )
    values = torch.cat([representable, halfway, torch.nextafter(halfway, torch.tensor(9e9)), anything])
    found = torch.empty(values.numel(), dtype=dtype)
    run(as_numpy(values), as_numpy(found))
    expected = values.to(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))
