"""The optimizers' rules for one row, compiled into the Numba kernel of their optimizer.

A rule takes (weight, first, second, steps, total, row, lr, constants, corrections, any_dim): the storage and its
state, the row's summed gradient and the optimizer's constants (float64).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ninerank.fusion.kernels.jit import jit_inline
from ninerank.fusion.kernels.lanes import Arithmetic

__all__ = ["RULES", "bias_corrections"]

CORRECTED_STEPS = 2048


@lru_cache(maxsize=8)
def bias_corrections(constants: tuple[float, ...]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """1 / (1 - b1^t) and 1 / (1 - b2^t) for t below CORRECTED_STEPS, flat: a row that is updated often costs no power."""
    ages = np.maximum(np.arange(CORRECTED_STEPS, dtype=np.float64), 1)[:, None]
    return np.asarray(1 / (1 - np.array(constants[:2]) ** ages), dtype=np.float32).reshape(-1)


def _sgd(fixed: int, ops: Arithmetic) -> Any:
    load, store, get, each, width = ops.load, ops.store, ops.get, ops.each, ops.width

    @jit_inline
    def apply(weight, first, second, steps, total, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        base = row * dim
        for column in range(0, dim, width):
            store(weight, base + column, load(weight, base + column) - each(lr) * get(total, column))

    return apply


def _adagrad(fixed: int, ops: Arithmetic) -> Any:
    load, store, get, put, each, root, width = ops.load, ops.store, ops.get, ops.put, ops.each, ops.root, ops.width

    @jit_inline
    def apply(weight, first, second, steps, total, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        base = row * dim
        eps = np.float32(constants[0])
        for column in range(0, dim, width):
            gradient = get(total, column)
            squares = get(first, base + column) + gradient * gradient
            put(first, base + column, squares)
            store(weight, base + column, load(weight, base + column) - each(lr) * gradient / (root(squares) + each(eps)))

    return apply


def _rowwise_adagrad(fixed: int, ops: Arithmetic) -> Any:
    load, store, get, each, sum_of, width = ops.load, ops.store, ops.get, ops.each, ops.total, ops.width

    @jit_inline
    def apply(weight, first, second, steps, total, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        base = row * dim
        squares = each(np.float32(0))
        for column in range(0, dim, width):
            squares = squares + get(total, column) * get(total, column)
        accumulated = first[row] + sum_of(squares) / np.float32(dim)
        first[row] = accumulated
        step_size = np.float32(lr / (np.sqrt(accumulated) + np.float32(constants[0])))
        for column in range(0, dim, width):
            store(weight, base + column, load(weight, base + column) - each(step_size) * get(total, column))

    return apply


def _adam(fixed: int, ops: Arithmetic) -> Any:
    load, store, get, put, each, root, width = ops.load, ops.store, ops.get, ops.put, ops.each, ops.root, ops.width

    @jit_inline
    def apply(weight, first, second, steps, total, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        base = row * dim
        beta1, beta2, eps = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
        rest1, rest2 = np.float32(1 - constants[0]), np.float32(1 - constants[1])
        age = np.int64(steps[row]) + 1
        steps[row] = age
        if age < CORRECTED_STEPS:
            correct1, correct2 = corrections[2 * age], corrections[2 * age + 1]
        else:
            correct1 = np.float32(1 / (1 - math.pow(constants[0], age)))
            correct2 = np.float32(1 / (1 - math.pow(constants[1], age)))
        step_size = np.float32(lr * correct1)
        for column in range(0, dim, width):
            gradient = get(total, column)
            m = each(beta1) * get(first, base + column) + each(rest1) * gradient
            v = each(beta2) * get(second, base + column) + each(rest2) * gradient * gradient
            put(first, base + column, m)
            put(second, base + column, v)
            step = each(step_size) * m / (root(v * each(correct2)) + each(eps))
            store(weight, base + column, load(weight, base + column) - step)

    return apply


def _ftrl(fixed: int, ops: Arithmetic) -> Any:
    load, store, get, put, each, width = ops.load, ops.store, ops.get, ops.put, ops.each, ops.width
    root, size, at_least, signed = ops.root, ops.size, ops.at_least, ops.signed

    @jit_inline
    def apply(weight, first, second, steps, total, row, lr, constants, corrections, any_dim):
        dim = any_dim if fixed == 0 else fixed
        base = row * dim
        beta, l1, l2 = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
        per_lr = np.float32(np.float32(1) / lr)
        for column in range(0, dim, width):
            gradient, n = get(total, column), get(second, base + column)
            squares = n + gradient * gradient
            new_root = root(squares)
            z = get(first, base + column) + gradient - (new_root - root(n)) * each(per_lr) * load(weight, base + column)
            put(first, base + column, z)
            put(second, base + column, squares)
            shrunk = at_least(size(z) - each(l1), each(np.float32(0)))
            magnitude = shrunk / ((each(beta) + new_root) * each(per_lr) + each(l2))
            store(weight, base + column, each(np.float32(0)) - signed(magnitude, z))

    return apply


RULES: dict[str, Callable[[int, Arithmetic], Any]] = {
    "sgd": _sgd,
    "adagrad": _adagrad,
    "rowwise_adagrad": _rowwise_adagrad,
    "adam": _adam,
    "ftrl": _ftrl,
}
