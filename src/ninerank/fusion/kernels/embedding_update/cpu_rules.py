"""The optimizers' rules for one row, compiled into the Numba kernel of their optimizer.

A rule takes (weight, first, second, steps, total, row, lr, constants, corrections, any_dim): the storage and
its state, the row's summed gradient and the optimizer's constants (float64).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ninerank.fusion.kernels.jit import Codec, jit_inline

__all__ = ["RULES", "bias_corrections"]

CORRECTED_STEPS = 2048


@lru_cache(maxsize=8)
def bias_corrections(constants: tuple[float, ...]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """1 / (1 - b1^t) and 1 / (1 - b2^t) for t below CORRECTED_STEPS, flat: a row that is updated often costs no power."""
    ages = np.maximum(np.arange(CORRECTED_STEPS, dtype=np.float64), 1)[:, None]
    return np.asarray(1 / (1 - np.array(constants[:2]) ** ages), dtype=np.float32).reshape(-1)


def _sgd(fixed: int, codec: Codec) -> Any:
    decode, encode = codec.decode, codec.encode

    @jit_inline
    def apply(weight, first, second, steps, total, fresh, fresh_first, fresh_second, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        for column in range(dim):
            fresh[column] = decode(weight[row, column]) - lr * total[column]
        for column in range(dim):
            weight[row, column] = encode(fresh[column])

    return apply


def _adagrad(fixed: int, codec: Codec) -> Any:
    decode, encode = codec.decode, codec.encode

    @jit_inline
    def apply(weight, first, second, steps, total, fresh, fresh_first, fresh_second, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        eps = np.float32(constants[0])
        for column in range(dim):
            gradient = total[column]
            squares = first[row, column] + gradient * gradient
            fresh_first[column] = squares
            fresh[column] = decode(weight[row, column]) - lr * gradient / (np.sqrt(squares) + eps)
        for column in range(dim):
            weight[row, column] = encode(fresh[column])
        for column in range(dim):
            first[row, column] = fresh_first[column]

    return apply


def _rowwise_adagrad(fixed: int, codec: Codec) -> Any:
    decode, encode = codec.decode, codec.encode

    @jit_inline
    def apply(weight, first, second, steps, total, fresh, fresh_first, fresh_second, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        squares = np.float32(0)
        for column in range(dim):
            squares += total[column] * total[column]
        accumulated = first[row] + squares / np.float32(dim)
        first[row] = accumulated
        step_size = lr / (np.sqrt(accumulated) + np.float32(constants[0]))
        for column in range(dim):
            fresh[column] = decode(weight[row, column]) - step_size * total[column]
        for column in range(dim):
            weight[row, column] = encode(fresh[column])

    return apply


def _adam(fixed: int, codec: Codec) -> Any:
    decode, encode = codec.decode, codec.encode

    @jit_inline
    def apply(weight, first, second, steps, total, fresh, fresh_first, fresh_second, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        beta1, beta2, eps = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
        rest1, rest2 = np.float32(1 - constants[0]), np.float32(1 - constants[1])
        age = np.int64(steps[row]) + 1
        steps[row] = age
        if age < CORRECTED_STEPS:
            correct1, correct2 = corrections[2 * age], corrections[2 * age + 1]
        else:
            correct1 = np.float32(1 / (1 - math.pow(constants[0], age)))
            correct2 = np.float32(1 / (1 - math.pow(constants[1], age)))
        step_size = lr * correct1
        for column in range(dim):
            gradient = total[column]
            m = beta1 * first[row, column] + rest1 * gradient
            v = beta2 * second[row, column] + rest2 * gradient * gradient
            fresh_first[column] = m
            fresh_second[column] = v
            fresh[column] = decode(weight[row, column]) - step_size * m / (np.sqrt(v * correct2) + eps)
        for column in range(dim):
            weight[row, column] = encode(fresh[column])
        for column in range(dim):
            first[row, column] = fresh_first[column]
        for column in range(dim):
            second[row, column] = fresh_second[column]

    return apply


def _ftrl(fixed: int, codec: Codec) -> Any:
    decode, encode = codec.decode, codec.encode

    @jit_inline
    def apply(weight, first, second, steps, total, fresh, fresh_first, fresh_second, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        beta, l1, l2 = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
        per_lr = np.float32(1) / lr
        for column in range(dim):
            gradient = total[column]
            root = np.sqrt(second[row, column])
            squares = second[row, column] + gradient * gradient
            new_root = np.sqrt(squares)
            z = first[row, column] + gradient - (new_root - root) * per_lr * decode(weight[row, column])
            fresh_first[column] = z
            fresh_second[column] = squares
            shrunk = max(abs(z) - l1, np.float32(0))
            value = shrunk / ((beta + new_root) * per_lr + l2)
            fresh[column] = value if z < np.float32(0) else -value
        for column in range(dim):
            weight[row, column] = encode(fresh[column])
        for column in range(dim):
            first[row, column] = fresh_first[column]
        for column in range(dim):
            second[row, column] = fresh_second[column]

    return apply


RULES: dict[str, Callable[[int, Codec], Any]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
    "ftrl": _ftrl,
}
