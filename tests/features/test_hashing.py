"""XXH64 against published values, and the same id hashing alike however it is held."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ninerank.features.hashing import hash_bytes, hash_ints, hash_strings

PRIME32, PRIME64, MASK = 2654435761, 11400714785074694797, (1 << 64) - 1


def sanity_bytes(size: int) -> bytes:
    """The buffer of xxHash's own sanity check: the top byte of PRIME32 * PRIME64^i."""
    state, out = PRIME32, bytearray()
    for _ in range(size):
        out.append(state >> 56)
        state = state * PRIME64 & MASK
    return bytes(out)


@pytest.mark.parametrize(
    ("size", "seed", "expected"),
    [
        (0, 0, 0xEF46DB3751D8E999),
        (0, PRIME32, 0xAC75FDA2929B17EF),
        (1, 0, 0xE934A84ADB052768),
        (1, PRIME32, 0x5014607643A9B4C3),
        (4, 0, 0x9136A0DCA57457EE),
        (14, 0, 0x8282DCC4994E35C8),
        (14, PRIME32, 0xC3BD6BF63DEB6DF0),
        (222, 0, 0xB641AE8CB691C174),
        (222, PRIME32, 0x20CB8AB7AE10C14A),
    ],
)
def test_published_sanity_values(size: int, seed: int, expected: int) -> None:
    assert hash_bytes(sanity_bytes(size), seed) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 0xD24EC4F1A98C6E5B),
        ("abc", 0x44BC2CF5AD770999),
        ("Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_known_strings(text: str, expected: int) -> None:
    assert hash_bytes(text.encode()) == expected
    assert hash_strings(pa.array([text])).tolist() == [expected]


@given(st.lists(st.text(max_size=80)), st.integers(0, (1 << 63) - 1))
def test_strings_hash_as_their_utf8_bytes(texts: list[str], seed: int) -> None:
    expected = [hash_bytes(text.encode(), seed) for text in texts]
    assert hash_strings(pa.array(texts, pa.string()), seed).tolist() == expected
    assert hash_strings(pa.array(["before", *texts], pa.large_string())[1:], seed).tolist() == expected


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)), st.integers(0, (1 << 63) - 1))
def test_integers_hash_as_their_eight_little_endian_bytes(values: list[int], seed: int) -> None:
    expected = [hash_bytes(value.to_bytes(8, "little", signed=True), seed) for value in values]
    assert hash_ints(np.array(values, np.int64), seed).tolist() == expected


def test_a_null_hashes_as_the_empty_string() -> None:
    assert hash_strings(pa.array(["x", None, ""])).tolist()[1:] == [hash_bytes(b"")] * 2


def test_hashes_spread_over_buckets() -> None:
    counts = np.bincount(hash_ints(np.arange(100_000)) % np.uint64(100), minlength=100)
    assert abs(counts - 1000).max() < 5 * 1000**0.5
