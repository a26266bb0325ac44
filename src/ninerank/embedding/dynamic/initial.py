"""First values of a row, from its id alone: N(0, std^2) by inversion of a counter-based random word.

    x(id, d) = std * Phi^-1(u),   u from word d of the stream that (seed, group, table) and the id open

so that neither the order in which ids arrive, nor the number of processes, nor an eviction in between changes what an id starts from.
Phi^-1 is algorithm AS 241 (PPND7; Wichura, Applied Statistics 37, 1988), relative error below 1e-6, with a logarithm made of
+ - * / alone: every machine with IEEE arithmetic gives the same bits.
"""

import math

import numpy as np
import numpy.typing as npt

from ninerank.embedding.dynamic.native import stream, stream_key
from ninerank.features.native import jit

__all__ = ["fill_rows", "initial_key", "initial_values"]

S12 = np.uint64(12)
ONE = np.uint64(1)
LN2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476
CENTRE, CENTRE_SQUARED = 0.425, 0.180625


@jit
def _log(x):  # type: ignore[no-untyped-def]
    """Natural logarithm of a normal float64 above 0, by the series of artanh."""
    m, exponent = math.frexp(x)
    if m < SQRT_HALF:
        m = 2.0 * m
        exponent -= 1
    t = (m - 1.0) / (m + 1.0)
    s = t * t
    tail = 1 / 9 + s * (1 / 11 + s * (1 / 13 + s * (1 / 15 + s / 17)))
    return exponent * LN2 + 2.0 * t * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * tail))))


@jit
def _normal(word):  # type: ignore[no-untyped-def]
    """Standard normal float64 from a random uint64: the lowest bit is the sign, the upper 52 the probability of the tail."""
    p = (float(word >> S12) + 0.5) * 2.0**-53
    q = 0.5 - p
    if q <= CENTRE:
        r = CENTRE_SQUARED - q * q
        x = q * (((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179)
        x /= ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    else:
        r = math.sqrt(-_log(p))
        if r <= 5.0:
            r -= 1.6
            x = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
            x /= (0.12021132975 * r + 0.73700164250) * r + 1.0
        else:
            r -= 5.0
            x = ((0.017337203997 * r + 0.42868294337) * r + 3.0812263860) * r + 6.6579051150
            x /= (0.012258202635 * r + 0.24197894225) * r + 1.0
    return -x if word & ONE else x


@jit
def fill_rows(values_VD, rows, ids, key, std):  # type: ignore[no-untyped-def]
    """Write the first values (float32) of each id into its row."""
    for i in range(rows.shape[0]):
        row, word = rows[i], np.uint64(ids[i])
        for d in range(values_VD.shape[1]):
            values_VD[row, d] = np.float32(_normal(stream(key, word, d))) * std


def initial_key(seed: int, group: str, table: str) -> np.uint64:
    """Key of the streams that one table draws a group's rows from."""
    return stream_key("initial", seed, group, table)


def initial_values(ids: npt.NDArray[np.int64], dim: int, *, seed: int, group: str, table: str, std: float) -> npt.NDArray[np.float32]:
    """First values (N, dim) of rows of the given ids.

    >>> a = initial_values(np.array([7, 8]), 4, seed=1, group="deep", table="item", std=0.01)
    >>> b = initial_values(np.array([8]), 4, seed=1, group="deep", table="item", std=0.01)
    >>> bool((a[1:] == b).all())
    True
    """
    values = np.empty((len(ids), dim), np.float32)
    fill_rows(values, np.arange(len(ids)), ids, initial_key(seed, group, table), np.float32(std))
    return values
