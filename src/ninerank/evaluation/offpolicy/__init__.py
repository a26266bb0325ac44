"""Counterfactual estimates: what another policy would have earned, from a log with propensities.

feedback.py     logged decisions, checked            estimators.py   IPS, clipped IPS, SNIPS, DM, DR, SNDR, switch-DR, DRos
valuation.py    all estimates of one policy, merged  diagnostics.py  effective size, weights, overlap, support, warnings
slates.py       lists: item-position, independent, cascade, reward-interaction IPS, pseudo-inverse
rewards.py      a reward model from the log itself, cross-fitted
position.py     position bias: from random traffic, from swaps, regression EM
logs.py         logs with columns mapped in YAML, joined ones and Open Bandit included
targets.py      target policies by name, and a log put to them
"""

from ninerank.evaluation.offpolicy.diagnostics import Diagnostics
from ninerank.evaluation.offpolicy.estimators import DR, IPS, SNDR, SNIPS, ClippedIPS, DirectMethod, DRos, Estimator, SwitchDR
from ninerank.evaluation.offpolicy.feedback import Feedback
from ninerank.evaluation.offpolicy.valuation import OffPolicy, Valuation, estimate

__all__ = [
    "DR",
    "IPS",
    "SNDR",
    "SNIPS",
    "ClippedIPS",
    "DRos",
    "Diagnostics",
    "DirectMethod",
    "Estimator",
    "Feedback",
    "OffPolicy",
    "SwitchDR",
    "Valuation",
    "estimate",
]
