"""Frozen values shared by every part; importing them loads numpy and nothing heavier."""

from cacheplan.types.model import FULL_ATTENTION, ModelSpec, Site
from cacheplan.types.plan import (
    Action,
    Budget,
    Certificate,
    Damage,
    Entry,
    FeatureAction,
    KVAction,
    Plan,
    Precision,
    Provenance,
    Trigger,
    WeightAction,
)
from cacheplan.types.problem import Coverage, Knapsack, Problem, Solution, Split
from cacheplan.types.profile import Profile, Statistic
from cacheplan.types.recipe import Recipe
from cacheplan.types.scorers import (
    SCORERS,
    AccumulatedAttention,
    KeyDifference,
    KeyNorm,
    Position,
    Random,
    Scorer,
    WindowAttention,
)

__all__ = [
    "FULL_ATTENTION",
    "SCORERS",
    "AccumulatedAttention",
    "Action",
    "Budget",
    "Certificate",
    "Coverage",
    "Damage",
    "Entry",
    "FeatureAction",
    "KVAction",
    "KeyDifference",
    "KeyNorm",
    "Knapsack",
    "ModelSpec",
    "Plan",
    "Position",
    "Precision",
    "Problem",
    "Profile",
    "Provenance",
    "Random",
    "Recipe",
    "Scorer",
    "Site",
    "Solution",
    "Split",
    "Statistic",
    "Trigger",
    "WeightAction",
    "WindowAttention",
]
