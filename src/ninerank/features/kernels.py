"""The transform's inner loops: one call for all features of a block, driven by a table of jobs.

A job is one row of int64s (columns below): where the values lie and how they become rows of a table, raw ids or float32 numbers.
Shape legend: F jobs, R rows. Elements are taken one by one with the same scalar code whatever the batch, without fast maths,
so that a row's result depends on that row alone, bit for bit.
"""

import math

import numpy as np

from ninerank.features.encoding import MISSING_ID
from ninerank.features.hashing import xxh64, xxh64_int
from ninerank.features.native import jit, load_f64, load_i32, load_i64, load_u8
from ninerank.features.vocabulary import find_int, find_string

__all__ = [
    "BUCKETS",
    "CLAMP",
    "HASH",
    "INT64",
    "JOB_WIDTH",
    "LOG",
    "NUM_DYNAMIC",
    "NUMBER",
    "NUMBERED",
    "RAW",
    "RAW_ID",
    "STANDARDISE",
    "STRING",
    "VOCABULARY",
    "bag_lengths",
    "fill_bags",
    "fill_dense",
    "fill_single",
]

# Where the values lie: set for each batch. VALID and LIST_VALID are bitmaps, 0 if nothing is null.
DATA, OFFSETS, VALID, START, LIST_OFFSETS, LIST_VALID, LIST_START = range(7)
NUM_DYNAMIC = 7
# What becomes of them: fixed when the spec is compiled.
TYPE, METHOD, MISSING, SIZE, SEED, SLOTS, MASK, MAX_LENGTH, KEEP_LAST, HAS_DEFAULT = range(NUM_DYNAMIC, NUM_DYNAMIC + 10)
JOB_WIDTH = NUM_DYNAMIC + 10
STRING, INT64, NUMBER = 0, 1, 2
# One column holds either kind of method, so all numbers differ.
HASH, VOCABULARY, BUCKETS = 0, 1, 2
RAW, LOG, STANDARDISE = 3, 4, 5
RAW_ID = 6
NUMBERED = 7
# Of numbered ids, in the place of a seed: an id out of range becomes the nearest; otherwise it counts as missing.
CLAMP = 1

LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
SQRT_HALF = 0.70710678118654752440
FLOAT32_MAX = 3.4028234663852886e38


@jit
def _is_null(bitmap, i):  # type: ignore[no-untyped-def]
    return bitmap != 0 and (load_u8(bitmap + (i >> 3)) >> np.uint64(i & 7)) & np.uint64(1) == np.uint64(0)


@jit
def _raw_id(job, i):  # type: ignore[no-untyped-def]
    """The 64-bit id of value `i`, MISSING_ID where there is none; a string whose hash is MISSING_ID takes the next number."""
    if _is_null(job[VALID], i):
        return np.int64(MISSING_ID)
    if job[TYPE] == INT64:
        return load_i64(job[DATA] + 8 * i)
    place = job[OFFSETS] + 4 * i
    start = np.int64(load_i32(place))
    size = np.int64(load_i32(place + 4)) - start
    if size == 0:
        return np.int64(MISSING_ID)
    return max(np.int64(xxh64(job[DATA] + start, size, np.uint64(job[SEED]))), np.int64(MISSING_ID + 1))


@jit
def _leaves_out(job):  # type: ignore[no-untyped-def]
    """Whether the feature is a bag of raw ids, in which what is missing has no place."""
    return job[METHOD] == RAW_ID and job[KEEP_LAST] == 0 and job[HAS_DEFAULT] == 0


@jit
def _num_present(job, begin, end):  # type: ignore[no-untyped-def]
    """How many of the values begin .. end are an id."""
    count = np.int64(0)
    for i in range(job[START] + begin, job[START] + end):
        if _is_null(job[VALID], i):
            continue
        if job[TYPE] == INT64:
            count += load_i64(job[DATA] + 8 * i) != MISSING_ID
        else:
            place = job[OFFSETS] + 4 * i
            count += load_i32(place) != load_i32(place + 4)
    return count


@jit
def _fill_present(job, begin, count, out, at):  # type: ignore[no-untyped-def]
    """The first `count` ids that are there from value `begin` on, into out[at:]."""
    i, stop = job[START] + begin, at + count
    while at < stop:
        out[at] = _raw_id(job, i)
        at += out[at] != MISSING_ID
        i += 1


@jit
def _encode(job, begin, count, out, at):  # type: ignore[no-untyped-def]
    """Rows of values begin .. begin + count into out[at:]; index of the first number that is not finite, or -1."""
    data, offsets, valid, missing = job[DATA], job[OFFSETS], job[VALID], job[MISSING]
    slots, mask = job[SLOTS], job[MASK]
    first = job[START] + begin
    if job[METHOD] == RAW_ID:
        for i in range(count):
            own = _raw_id(job, first + i)
            out[at + i] = missing if own == MISSING_ID else own
    elif job[TYPE] == STRING:
        if job[METHOD] == HASH:
            seed, buckets = np.uint64(job[SEED]), np.uint64(job[SIZE])
            for i in range(count):
                place = offsets + 4 * (first + i)
                start = np.int64(load_i32(place))
                size = np.int64(load_i32(place + 4)) - start
                if size == 0 or _is_null(valid, first + i):
                    out[at + i] = missing
                else:
                    out[at + i] = 1 + np.int64(xxh64(data + start, size, seed) % buckets)
        else:
            for i in range(count):
                place = offsets + 4 * (first + i)
                start = np.int64(load_i32(place))
                size = np.int64(load_i32(place + 4)) - start
                if size == 0 or _is_null(valid, first + i):
                    out[at + i] = missing
                else:
                    out[at + i] = find_string(data + start, size, slots, mask)
    elif job[TYPE] == INT64:
        if job[METHOD] == HASH:
            seed, buckets = np.uint64(job[SEED]), np.uint64(job[SIZE])
            for i in range(count):
                if _is_null(valid, first + i):
                    out[at + i] = missing
                else:
                    out[at + i] = 1 + np.int64(xxh64_int(load_i64(data + 8 * (first + i)), seed) % buckets)
        elif job[METHOD] == NUMBERED:
            last = job[SIZE] - 1
            for i in range(count):
                out[at + i] = missing
                if not _is_null(valid, first + i):
                    own = load_i64(data + 8 * (first + i))
                    if 0 <= own <= last or job[SEED] == CLAMP:
                        out[at + i] = 1 + min(max(own, 0), last)
        else:
            for i in range(count):
                if _is_null(valid, first + i):
                    out[at + i] = missing
                else:
                    out[at + i] = find_int(load_i64(data + 8 * (first + i)), slots, mask)
    else:
        num_boundaries = job[SIZE]
        for i in range(count):
            if _is_null(valid, first + i):
                out[at + i] = missing
            else:
                x = load_f64(data + 8 * (first + i))
                if not math.isfinite(x):
                    return i
                low, high = np.int64(0), num_boundaries
                while low < high:
                    middle = (low + high) // 2
                    if load_f64(slots + 8 * middle) <= x:
                        low = middle + 1
                    else:
                        high = middle
                out[at + i] = 1 + low
    return -1


@jit
def fill_single(jobs, num_rows, out):  # type: ignore[no-untyped-def]
    """out[f * R + r] = table row or raw id of feature f in row r; returns f * R + r of the first number that is not finite, or -1."""
    for f in range(jobs.shape[0]):
        bad = _encode(jobs[f], 0, num_rows, out, f * num_rows)
        if bad >= 0:
            return f * num_rows + bad
    return -1


@jit
def bag_lengths(jobs, num_rows, out):  # type: ignore[no-untyped-def]
    """out[f * R + r] = number of ids that feature f keeps in row r; returns their sum."""
    total = np.int64(0)
    for f in range(jobs.shape[0]):
        offsets, valid, start, longest = jobs[f, LIST_OFFSETS], jobs[f, LIST_VALID], jobs[f, LIST_START], jobs[f, MAX_LENGTH]
        for r in range(num_rows):
            size = np.int64(0)
            if not _is_null(valid, start + r):
                place = offsets + 4 * (start + r)
                begin, end = np.int64(load_i32(place)), np.int64(load_i32(place + 4))
                size = min(_num_present(jobs[f], begin, end) if _leaves_out(jobs[f]) else end - begin, longest)
            if size == 0 and jobs[f, HAS_DEFAULT] and jobs[f, KEEP_LAST] == 0:
                size = np.int64(1)
            out[f * num_rows + r] = size
            total += size
    return total


@jit
def fill_bags(jobs, num_rows, lengths, out):  # type: ignore[no-untyped-def]
    """Table rows, or raw ids, of all ids, feature by feature and row by row, `lengths` as `bag_lengths` gave them."""
    at = 0
    for f in range(jobs.shape[0]):
        offsets, valid, start = jobs[f, LIST_OFFSETS], jobs[f, LIST_VALID], jobs[f, LIST_START]
        for r in range(num_rows):
            size = lengths[f * num_rows + r]
            if size == 0:
                continue
            begin = np.int64(load_i32(offsets + 4 * (start + r)))
            end = np.int64(load_i32(offsets + 4 * (start + r) + 4))
            if begin == end or _is_null(valid, start + r):
                out[at] = jobs[f, MISSING]
            elif _leaves_out(jobs[f]):
                _fill_present(jobs[f], begin, size, out, at)
            else:
                _encode(jobs[f], end - size if jobs[f, KEEP_LAST] else begin, size, out, at)
            at += size


@jit
def log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) for x >= 0 by + - * / and frexp alone: the same bits on every host and in every vector width.

    log m = 2 artanh s with s = (m - 1) / (m + 1), summed to s^23; (x - (u - 1)) / u restores what u = 1 + x rounded off.
    """
    u = 1.0 + x
    m, exponent = math.frexp(u)
    if m < SQRT_HALF:
        m *= 2.0
        exponent -= 1
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    series = 0.0
    for n in range(23, 1, -2):
        series = (series + 1.0 / n) * z
    rest = (x - (u - 1.0)) / u
    k = np.float64(exponent)
    return k * LN2_HIGH + (2.0 * s + (2.0 * s * series + (k * LN2_LOW + rest)))


@jit
def fill_dense(jobs, numbers, num_rows, out):  # type: ignore[no-untyped-def]
    """out[r, f] = transformed number; numbers[f] = (a, b, value of a missing number): standardise is (x - a) / b.

    Returns f * R + r of the first number that is not finite, before or after the transform, or -1.
    """
    for f in range(jobs.shape[0]):
        data, valid, start, method = jobs[f, DATA], jobs[f, VALID], jobs[f, START], jobs[f, METHOD]
        a, b, missing = numbers[f, 0], numbers[f, 1], numbers[f, 2]
        for r in range(num_rows):
            if _is_null(valid, start + r):
                out[r, f] = missing
                continue
            x = load_f64(data + 8 * (start + r))
            if method == LOG:
                y = math.copysign(log1p(abs(x)), x) if math.isfinite(x) else x
            elif method == STANDARDISE:
                y = (x - a) / b
            else:
                y = x
            if not abs(y) <= FLOAT32_MAX:
                return f * num_rows + r
            out[r, f] = y
    return -1
