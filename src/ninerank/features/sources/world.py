"""The ground truth of the synthetic log: users, items, what users looked at before, and the true logit of a click.

    logit(r, i) = b + user(u) + item(i) + context(t)              main effects of visible attributes and small ones of the ids
                + g[segment, department] + h[daypart, department] - k_segment z_price
                + w 7 n / (n + 4),    n = number of items in the history that are of the candidate's category

The history counts where it holds the candidate's own category: what attention to the candidate can count, and what a plain mean of
the history blurs.

Shape legend: U users, I items, R requests, C candidates a request, L history length, S events of all users' streams.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from ninerank.config import Config

__all__ = ["Requests", "World"]

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Strength = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]

NUM_SEGMENTS, NUM_AGES, NUM_DEVICES, NUM_DAYPARTS, CROSS_RANK = 8, 7, 3, 4, 2
NUM_DEPARTMENTS, CATEGORIES_EACH, BRANDS_EACH, NUM_TAGS, MAX_TAGS = 8, 3, 6, 30, 3
NUM_CATEGORIES = NUM_DEPARTMENTS * CATEGORIES_EACH
FAVOURITES, FAVOURITE_SHARE = 3, 0.8
DAY_MS = 86_400_000
DEVICE_SHARES = np.array([0.6, 0.3, 0.1])
START_MS = 1_735_689_600_000


class Effects(Config):
    """Standard deviations of the logit's parts over users, items, pairs or times; `history` is the weight w."""

    segment: Strength = 0.4
    age: Strength = 0.3
    activity: Strength = 0.25
    user_id: Strength = 0.05
    category: Strength = 0.6
    brand: Strength = 0.35
    tags: Strength = 0.2
    price: Strength = 0.3
    quality: Strength = 0.45
    item_id: Strength = 0.05
    hour: Strength = 0.3
    device: Strength = 0.25
    segment_department: Strength = 0.32
    daypart_department: Strength = 0.12
    segment_price: Strength = 0.15
    history: Strength = 0.22


@dataclass(frozen=True)
class Requests:
    """Requests in time order: who asks when, with which device, and how far the user's stream has come."""

    user_R: Ints
    time_ms_R: Ints
    device_R: Ints
    event_R: Ints
    history_size_R: Ints

    def __len__(self) -> int:
        return len(self.user_R)


class World:
    """Everything drawn once: attributes, effects and streams. All randomness comes from `seed`."""

    def __init__(
        self, *, num_users: int, num_items: int, num_requests: int, history_length: int, days: int, effects: Effects, seed: int
    ) -> None:
        self.effects, self.history_length, self.days = effects, history_length, days
        draws = iter(np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(5))
        self._draw_users(next(draws), num_users)
        self._draw_items(next(draws), num_items)
        self._draw_pairs(next(draws))
        self._draw_requests(next(draws), num_requests)
        self._draw_streams(next(draws))

    def _draw_users(self, rng: np.random.Generator, count: int) -> None:
        e = self.effects
        self.user_id_U = _distinct_ids(rng, count)
        self.popularity_U = _zipf(rng, count, 0.9)
        self.segment_U = rng.choice(NUM_SEGMENTS, count, p=_zipf(rng, NUM_SEGMENTS, 0.5))
        self.age_U = rng.choice(NUM_AGES, count, p=_zipf(rng, NUM_AGES, 0.4))
        self.age_known_U = rng.random(count) >= 0.05
        self.activity_U = np.round(np.exp(rng.normal(3.0, 1.2, count)))
        liking_of_segment = rng.gamma(0.3, size=(NUM_SEGMENTS, NUM_CATEGORIES)) + 0.02
        scores = np.log(liking_of_segment[self.segment_U]) + rng.gumbel(size=(count, liking_of_segment.shape[1]))
        self.favourites_UK = np.argsort(-scores, axis=1)[:, :FAVOURITES]
        shown_age_U = np.where(self.age_known_U, self.age_U, NUM_AGES)
        self.effect_U = _total(
            std * _standard(part_U, self.popularity_U)
            for std, part_U in (
                (e.segment, rng.normal(size=NUM_SEGMENTS)[self.segment_U]),
                (e.age, rng.normal(size=NUM_AGES + 1)[shown_age_U]),
                (e.activity, np.log1p(self.activity_U)),
                (e.user_id, rng.normal(size=count)),
            )
        )

    def _draw_items(self, rng: np.random.Generator, count: int) -> None:
        e = self.effects
        self.item_id_I = _distinct_ids(rng, count)
        self.popularity_I = _zipf(rng, count, 0.8)
        self.category_I = rng.integers(0, NUM_CATEGORIES, count)
        self.department_I = self.category_I // CATEGORIES_EACH
        self.brand_I = self.department_I * BRANDS_EACH + rng.choice(BRANDS_EACH, count, p=_zipf(rng, BRANDS_EACH, 0.7))
        self.num_tags_I = rng.integers(0, MAX_TAGS + 1, count)
        self.tags_IM = np.argsort(rng.random((count, NUM_TAGS)), axis=1)[:, :MAX_TAGS]
        self.price_I = np.round(np.exp(rng.normal(0, 0.8, count) + rng.normal(3.0, 0.5, NUM_DEPARTMENTS)[self.department_I]), 2)
        self.price_known_I = rng.random(count) >= 0.02
        self.quality_I = np.round(rng.beta(5, 2, count) * 5, 2)
        known_I = self.price_known_I
        log_price_I = np.where(known_I, np.log1p(self.price_I), np.log1p(self.price_I[known_I]).mean() if known_I.any() else 0.0)
        self.z_price_I = _standard(log_price_I, self.popularity_I)
        has = np.arange(MAX_TAGS) < self.num_tags_I[:, None]
        self.effect_I = _total(
            std * _standard(part_I, self.popularity_I)
            for std, part_I in (
                (e.category, rng.normal(size=NUM_CATEGORIES)[self.category_I]),
                (e.brand, rng.normal(size=NUM_DEPARTMENTS * BRANDS_EACH)[self.brand_I]),
                (e.tags, (rng.normal(size=NUM_TAGS)[self.tags_IM] * has).sum(1) / np.maximum(self.num_tags_I, 1)),
                (e.price, -self.z_price_I),
                (e.quality, self.quality_I),
                (e.item_id, rng.normal(size=count)),
            )
        )

    def _draw_pairs(self, rng: np.random.Generator) -> None:
        e = self.effects
        segments = np.bincount(self.segment_U, self.popularity_U, NUM_SEGMENTS).astype(np.float64)
        departments = np.bincount(self.department_I, self.popularity_I, NUM_DEPARTMENTS).astype(np.float64)
        dots = rng.normal(size=(NUM_SEGMENTS, CROSS_RANK)) @ rng.normal(size=(CROSS_RANK, NUM_DEPARTMENTS))
        self.segment_department = e.segment_department * _pure_cross(dots, segments, departments)
        by_daypart = rng.normal(size=(NUM_DAYPARTS, NUM_DEPARTMENTS))
        self.daypart_department = e.daypart_department * _pure_cross(by_daypart, np.ones(NUM_DAYPARTS), departments)
        self.price_slope = e.segment_price * _standard(rng.normal(size=NUM_SEGMENTS), segments)
        self.hour_effect = e.hour * _standard(np.sin((np.arange(24) - 14) * np.pi / 12) + 0.5 * rng.normal(size=24))
        self.device_effect = e.device * _standard(rng.normal(size=NUM_DEVICES), DEVICE_SHARES)

    def _draw_requests(self, rng: np.random.Generator, count: int) -> None:
        user = rng.choice(len(self.user_id_U), count, p=self.popularity_U)
        busy = 1.2 + np.sin((np.arange(24) - 9) * np.pi / 12)
        hour = rng.choice(24, count, p=busy / busy.sum())
        time = START_MS + rng.integers(0, self.days, count) * DAY_MS + hour * 3_600_000 + rng.integers(0, 3_600_000, count)
        time.sort()
        self._user_R, self._time_ms_R, self._device_R = user, time, rng.choice(NUM_DEVICES, count, p=DEVICE_SHARES)

    def _draw_streams(self, rng: np.random.Generator) -> None:
        """What each user looked at: mostly items of favourite categories, else popular ones; 0 to 3 events between requests."""
        user_R, users = self._user_R, len(self.user_id_U)
        steps_R = rng.integers(0, 4, len(user_R))
        first_size_U = rng.integers(0, 2 * self.history_length + 1, users)
        grown_U = np.bincount(user_R, steps_R, users).astype(np.int64)
        size_U = first_size_U + grown_U
        start_U = np.cumsum(size_U) - size_U
        by_user = np.argsort(user_R, kind="stable")
        position_R = np.empty(len(user_R), np.int64)
        position_R[by_user] = np.cumsum(steps_R[by_user]) - (np.cumsum(grown_U) - grown_U)[user_R[by_user]]
        position_R += first_size_U[user_R]
        owner_S = np.repeat(np.arange(users), size_U)
        favoured_S = rng.random(len(owner_S)) < FAVOURITE_SHARE
        favourite_S = self.favourites_UK[owner_S, rng.integers(0, FAVOURITES, len(owner_S))]
        popular_S = rng.choice(len(self.item_id_I), len(owner_S), p=self.popularity_I)
        self.stream_S = np.where(favoured_S, self._item_of_category(rng, favourite_S), popular_S)
        size_R = np.minimum(position_R, self.history_length)
        self.requests = Requests(user_R, self._time_ms_R, self._device_R, start_U[user_R] + position_R, size_R)

    def _item_of_category(self, rng: np.random.Generator, category_S: Ints) -> Ints:
        """An item of each category by popularity within it; a category without items gives any item."""
        by_category = np.argsort(self.category_I, kind="stable")
        mass = np.concatenate([[0.0], np.cumsum(self.popularity_I[by_category])])
        first = np.searchsorted(self.category_I[by_category], np.arange(NUM_CATEGORIES + 1))
        low, high = mass[first[category_S]], mass[first[category_S + 1]]
        point = np.where(high > low, low + rng.random(len(category_S)) * (high - low), rng.random(len(category_S)) * mass[-1])
        chosen: Ints = by_category[np.minimum(np.searchsorted(mass, point, side="right") - 1, len(by_category) - 1)]
        return chosen

    def candidates(self, rng: np.random.Generator, count: int, num_candidates: int) -> Ints:
        """(count, num_candidates) distinct items a request, by popularity."""
        cumulative = np.cumsum(self.popularity_I)
        item_RC = np.searchsorted(cumulative, rng.random((count, num_candidates)) * cumulative[-1], side="right")
        while True:
            order = np.argsort(item_RC, axis=1, kind="stable")
            ranked = np.take_along_axis(item_RC, order, 1)
            again = np.zeros(item_RC.shape, bool)
            np.put_along_axis(again, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
            if not again.any():
                return np.asarray(np.minimum(item_RC, len(self.item_id_I) - 1))
            item_RC[again] = np.searchsorted(cumulative, rng.random(int(again.sum())) * cumulative[-1], side="right")

    def history(self, requests: slice) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Items (R, L), most recent last, padded at the front, and which places hold one."""
        event, size = self.requests.event_R[requests], self.requests.history_size_R[requests]
        back = np.arange(self.history_length, 0, -1)
        there = back <= size[:, None]
        return self.stream_S[np.where(there, event[:, None] - back, 0)] if len(self.stream_S) else there.astype(np.int64), there

    def logit(self, requests: slice, item_RC: Ints) -> Array:
        """True logit (R, C) of each candidate, without the intercept."""
        r = self.requests
        user, hour = r.user_R[requests], hour_of(r.time_ms_R[requests])
        segment, department = self.segment_U[user], self.department_I[item_RC]
        of_request = self.effect_U[user] + self.hour_effect[hour] + self.device_effect[r.device_R[requests]]
        daypart = hour * NUM_DAYPARTS // 24
        crosses = self.segment_department[segment[:, None], department] + self.daypart_department[daypart[:, None], department]
        crosses -= self.price_slope[segment][:, None] * self.z_price_I[item_RC]
        history, there = self.history(requests)
        category_RL = np.where(there, self.category_I[history], -1)
        matches = (category_RL[:, None, :] == self.category_I[item_RC][:, :, None]).sum(2)
        return np.asarray(of_request[:, None] + self.effect_I[item_RC] + crosses + self.effects.history * interest(matches))


def interest(matches: npt.NDArray[np.int64]) -> Array:
    """Effect of the number of matches in the history, in units of `Effects.history`: each further match counts less."""
    return np.asarray(7.0 * matches / (matches + 4.0))


def hour_of(time_ms: Ints) -> Ints:
    """Hour of the day, UTC."""
    return time_ms // 3_600_000 % 24


def _total(parts: Iterable[Array]) -> Array:
    return np.asarray(np.sum(list(parts), axis=0))


def _zipf(rng: np.random.Generator, count: int, exponent: float) -> Array:
    """Probabilities proportional to rank^-exponent, ranks shuffled."""
    weight = rng.permutation(np.arange(1, count + 1) ** -exponent)
    return np.asarray(weight / weight.sum())


def _distinct_ids(rng: np.random.Generator, count: int) -> Ints:
    """Distinct positive ids in no order, as a catalogue's are."""
    return rng.permutation(np.unique(rng.integers(10**8, 10**9, 2 * count + 100))[:count])


def _standard(values: Array, weights: Array | None = None) -> Array:
    """Shifted and scaled to mean 0 and standard deviation 1 under `weights`: how often each value is shown."""
    shares = np.full(values.shape, 1.0 / values.size) if weights is None else weights / weights.sum()
    centred = values - (values * shares).sum()
    std = np.sqrt((centred**2 * shares).sum())
    return np.asarray(centred / std if std > 0 else centred)


def _pure_cross(values: Array, rows: Array, columns: Array) -> Array:
    """A standardised matrix whose weighted row and column means are 0: nothing that a main effect could explain."""
    p, q = rows / rows.sum(), columns / columns.sum()
    centred = values - p @ values - (values @ q)[:, None] + p @ values @ q
    return _standard(centred, np.outer(p, q))
