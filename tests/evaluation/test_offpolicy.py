"""Counterfactual estimators: against the Open Bandit Pipeline's figures, known policy values, merging, and what they refuse or warn of."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ninerank.errors import DataError
from ninerank.evaluation.offpolicy import (
    DR,
    IPS,
    SNDR,
    SNIPS,
    ClippedIPS,
    DirectMethod,
    DRos,
    Feedback,
    OffPolicy,
    SwitchDR,
    estimate,
)
from ninerank.evaluation.offpolicy.rewards import cross_fit

# What the Open Bandit Pipeline (obp 0.4.1) gives on the arrays of `small`.
OPEN_BANDIT_PIPELINE = {
    "ips": 0.2681154295695901,
    "clipped_ips": 0.14696042811865326,
    "snips": 0.3187544496058934,
    "dm": 0.4537777391568126,
    "dr": 0.42933339441496166,
    "sndr": 0.424716585657838,
    "switch_dr": 0.4658961590990709,
    "dros": 0.45485207317052306,
}


def small() -> Feedback:
    rng = np.random.default_rng(20)
    logging, target, q = rng.dirichlet(np.ones(4), 50), rng.dirichlet(np.ones(4), 50), rng.random((50, 4))
    action = np.array([rng.choice(4, p=chance) for chance in logging])
    reward = rng.random(50) < q[np.arange(50), action]
    return Feedback.of_actions(reward, action, logging[np.arange(50), action], target, model_NA=q * 0.8 + 0.05)


def test_estimates_are_those_of_the_open_bandit_pipeline() -> None:
    estimators = (IPS(), ClippedIPS(0.5), SNIPS(), DirectMethod(), DR(), SNDR(), SwitchDR(2.0), DRos(3.0))
    found = estimate(small(), estimators).estimates
    assert {name: own.value for name, own in found.items()} == pytest.approx(OPEN_BANDIT_PIPELINE, abs=1e-9)


def test_limits_of_the_families_are_their_relatives() -> None:
    rows = small()
    whole = {name: own.value for name, own in estimate(rows).estimates.items()}
    edges = {name: own.value for name, own in estimate(rows, (ClippedIPS(1e9), SwitchDR(1e9), DRos(math.inf))).estimates.items()}
    assert edges["clipped_ips"] == pytest.approx(whole["ips"])
    assert edges["switch_dr"] == pytest.approx(whole["dr"])
    assert edges["dros"] == pytest.approx(whole["dr"])
    none = {name: own.value for name, own in estimate(rows, (SwitchDR(0.0), DRos(0.0))).estimates.items()}
    assert none["switch_dr"] == pytest.approx(whole["dm"])
    assert none["dros"] == pytest.approx(whole["dm"])


class World:
    """A source with a known policy value: 3 contexts, 5 actions, click chances, a logging and a target policy; 1 to 4 rows a request."""

    def __init__(self) -> None:
        rng = np.random.default_rng(8)
        self.chance_CA = rng.uniform(0.02, 0.3, (3, 5))
        self.logging_CA = rng.dirichlet(np.full(5, 4.0), 3) * 0.8 + 0.04
        lean = self.chance_CA**2
        self.target_CA = lean / lean.sum(1, keepdims=True)
        self.logging_value = float((self.logging_CA * self.chance_CA).sum(1).mean())
        self.value = float((self.target_CA * self.chance_CA).sum(1).mean())

    def draw(self, seed: int, requests: int, *, shared: bool = True) -> tuple[Feedback, np.ndarray]:
        """Rows of one request share the context, and a mood that moves their click chances together (mean 1)."""
        rng = np.random.default_rng(seed)
        size = rng.integers(1, 5, requests)
        request = np.repeat(np.arange(requests), size)
        context = rng.integers(0, 3, requests)[request]
        mood = (rng.choice([0.4, 1.6], requests) if shared else np.ones(requests))[request]
        action = (rng.random(len(request))[:, None] > self.logging_CA[context].cumsum(1)).sum(1).clip(0, 4)
        reward = rng.random(len(request)) < self.chance_CA[context, action] * mood
        fitted = cross_fit(reward, action, context, self.target_CA, cluster_N=request)
        propensity, target = self.logging_CA[context, action], self.target_CA[context, action]
        return Feedback.of(reward, propensity, target, cluster_N=request, model_N=fitted.model_N, base_N=fitted.base_N), context


WORLD = World()
RUNS = 200
# Clips, switches and shrinkage that leave the weights of this world (below 15) as they are, to within their standard error.
UNBIASED = (IPS(), ClippedIPS(50.0), SNIPS(), DR(), SNDR(), SwitchDR(50.0), DRos(1e4))


def cover(seeds: range, requests: int) -> dict[str, float]:
    """Share of runs whose interval holds the truth, of values and of lifts."""
    hits: dict[str, int] = {}
    for seed in seeds:
        found = estimate(WORLD.draw(seed, requests)[0], UNBIASED)
        hits["logged"] = hits.get("logged", 0) + found.logged.covers(WORLD.logging_value)
        for name, own in found.estimates.items():
            hits[name] = hits.get(name, 0) + own.covers(WORLD.value)
            lift = f"lift of {name}"
            hits[lift] = hits.get(lift, 0) + found.lifts[name].covers(WORLD.value - WORLD.logging_value)
    return {name: count / len(seeds) for name, count in hits.items()}


def test_intervals_cover_the_known_value() -> None:
    shares = cover(range(RUNS), 600)
    assert len(shares) == 1 + 2 * len(UNBIASED)
    assert all(0.90 <= share <= 0.99 for share in shares.values()), shares


@pytest.mark.slow
def test_intervals_cover_the_known_value_of_long_logs() -> None:
    shares = cover(range(1000, 1000 + RUNS), 10_000)
    assert all(0.90 <= share <= 0.99 for share in shares.values()), shares


# The interval knows nothing of the error of a fitted model: the direct method assumes one that is right.
def test_direct_method_covers_where_its_model_is_right() -> None:
    hits = 0
    for seed in range(RUNS):
        rows, context = WORLD.draw(seed, 300)
        base = (WORLD.target_CA * WORLD.chance_CA).sum(1)[context]
        rows = Feedback.of(rows.reward_N, rows.propensity_N, rows.target_N, cluster_N=rows.cluster_N, model_N=base, base_N=base)
        hits += estimate(rows, (DirectMethod(),)).estimates["dm"].covers(WORLD.value)
    assert 0.90 <= hits / RUNS <= 0.99


def test_clusters_widen_the_intervals_of_alike_rows() -> None:
    rows, _ = WORLD.draw(3, 6000)
    rows = rows[np.repeat(np.arange(len(rows)), 2)]  # every row twice, in one request
    alone = Feedback.of(rows.reward_N, rows.propensity_N, rows.target_N)
    assert estimate(rows).estimates["ips"].standard_error > 1.3 * estimate(alone).estimates["ips"].standard_error


def test_the_logging_policy_is_valued_at_its_mean_reward() -> None:
    rows, _ = WORLD.draw(4, 900)
    same = Feedback.of(rows.reward_N, rows.propensity_N, rows.propensity_N, cluster_N=rows.cluster_N)
    found = estimate(same)
    assert found.estimates["ips"].value == found.estimates["snips"].value == rows.reward_N.mean()
    assert found.lifts["ips"].value == 0
    assert found.diagnostics.effective_size == len(rows)
    assert found.diagnostics.warnings == ()
    assert set(found.estimates) == {"ips", "clipped_ips", "snips"}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100), cut=st.integers(0, 60), model=st.booleans(), clustered=st.booleans())
def test_merge_over_any_split_is_the_whole(seed: int, cut: int, model: bool, clustered: bool) -> None:
    rows, _ = WORLD.draw(seed, 30)
    rows = Feedback.of(
        rows.reward_N,
        rows.propensity_N,
        rows.target_N,
        cluster_N=rows.cluster_N if clustered else None,
        **({"model_N": rows.model_N, "base_N": rows.base_N} if model else {}),
    )
    parts = [OffPolicy().update(rows[cut:]), OffPolicy().update(rows[:cut])]
    merged = OffPolicy.from_state(parts[0].state()).merge(OffPolicy.from_state(parts[1].state())).value()
    whole = estimate(rows)
    for name, own in whole.estimates.items():
        assert merged.estimates[name] == pytest.approx(own, rel=1e-6, abs=1e-9, nan_ok=True)
        assert merged.lifts[name] == pytest.approx(whole.lifts[name], rel=1e-6, abs=1e-9, nan_ok=True)
    for mine, theirs in zip(merged.diagnostics[:-1], whole.diagnostics[:-1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12, nan_ok=True)
    assert len(merged.diagnostics.warnings) == len(whole.diagnostics.warnings)


def test_warnings_name_what_speaks_against_the_estimates() -> None:
    rng = np.random.default_rng(1)
    propensity = np.full(2000, 0.5)
    propensity[0] = 5e-5
    found = OffPolicy((IPS(),)).update(Feedback.of(rng.random(2000) < 0.1, propensity, np.full(2000, 0.5)), np.full(2000, 0.25)).value()
    said = " | ".join(found.diagnostics.warnings)
    assert found.diagnostics.largest_weight == pytest.approx(10_000)
    assert found.diagnostics.effective_size == pytest.approx((10_000 + 1999) ** 2 / (1e8 + 1999))
    for part in ("effective sample size 1 of 2000", "one decision of weight 1e+04 carries 83.3%", "25.00% of the target's", "5e-05"):
        assert part in said
    wrong = estimate(Feedback.of(rng.random(2000) < 0.1, np.full(2000, 0.5), np.full(2000, 0.2)))
    assert any("mean weight 0.4" in line for line in wrong.diagnostics.warnings)
    never = estimate(Feedback.of([1, 0], [0.5, 0.5], [0.0, 0.0]))
    assert any("takes none of the logged actions" in line for line in never.diagnostics.warnings)
    assert math.isnan(never.estimates["snips"].value)
    assert never.as_dict()["estimates"]["snips"]["value"] is None


def test_what_cannot_be_answered_is_refused_and_says_what_to_log() -> None:
    with pytest.raises(DataError, match="has no propensities.*log with each decision the probability"):
        Feedback.of([1, 0], None, [0.5, 0.5])
    with pytest.raises(DataError, match=r"propensity 0.0 in row 1 \(and 1 more\): above 0.*log with each"):
        Feedback.of([1, 0, 0], [0.5, 0.0, math.nan], [0.5, 0.5, 0.5])
    with pytest.raises(DataError, match="target probability 1.5 in row 0"):
        Feedback.of([1], [0.5], [1.5])
    with pytest.raises(DataError, match="needs both"):
        Feedback.of([1], [0.5], [0.5], model_N=[0.5])
    with pytest.raises(DataError, match="dm needs a reward model|reward model is needed"):
        estimate(Feedback.of([1], [0.5], [0.5]), (DirectMethod(),))
    with pytest.raises(DataError, match="row 0 sum to 0.9"):
        Feedback.of_actions([1], [0], [0.5], [[0.5, 0.4]])
    with pytest.raises(DataError, match="an action is 2: 0 to 1"):
        Feedback.of_actions([1], [2], [0.5], [[0.5, 0.5]])
    with pytest.raises(DataError, match="rewards: nan in row 1"):
        Feedback.of([1, math.nan], [0.5, 0.5], [0.5, 0.5])
    with pytest.raises(DataError, match="no decisions"):
        OffPolicy().value()
    with pytest.raises(DataError, match="some without"):
        OffPolicy().update(small()).update(Feedback.of([1], [0.5], [0.5]))
    with pytest.raises(ValueError, match="do not merge"):
        OffPolicy().update(small()).merge(OffPolicy().update(Feedback.of([1], [0.5], [0.5])))
    with pytest.raises(ValueError, match="each once"):
        OffPolicy((IPS(), IPS()))


def test_cross_fit_never_sees_the_row_it_judges() -> None:
    action, context, cluster = np.array([0, 0, 1, 1] * 50), np.zeros(200, int), np.arange(200)
    reward = np.zeros(200)
    quiet = cross_fit(reward, action, context, [[0.5, 0.5]], cluster_N=cluster)
    reward[17] = 1.0
    loud = cross_fit(reward, action, context, [[0.5, 0.5]], cluster_N=cluster)
    assert (quiet.model_N == 0).all()
    assert loud.model_N[17] == 0
    assert (loud.model_N > 0).sum() > 100
    everywhere = cross_fit(np.ones(200), action, context, [[0.3, 0.7]], cluster_N=cluster)
    np.testing.assert_allclose(everywhere.base_N, 1)
    for action, context, message in (
        ([0, 2], [0, 0], "actions are int64: integers from 0 to 1"),
        ([0, 0], [0.0, 0.0], "contexts are float64"),
    ):
        with pytest.raises(DataError, match=message):
            cross_fit([1.0, 0.0], np.array(action), np.array(context), [[0.5, 0.5]])
