"""Profile a model, solve for a cache plan under a budget, apply it at inference.

plan = cacheplan.load_plan("plan.json")
with cacheplan.apply(model, plan):
    model.generate(...)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cacheplan.api import load_profile, merge, profile, solve, verify
    from cacheplan.plans.io import read_plan as load_plan
    from cacheplan.plans.io import write_plan as save_plan
    from cacheplan.runtime import PlanCache, apply

__version__ = "0.1.0"

__all__ = [
    "PlanCache",
    "apply",
    "load_plan",
    "load_profile",
    "merge",
    "profile",
    "save_plan",
    "solve",
    "verify",
]

# loaded on first use: reading a plan must not import torch, nor serving one scipy
_HOMES = {
    "PlanCache": ("cacheplan.runtime.cache", "PlanCache"),
    "apply": ("cacheplan.runtime.install", "apply"),
    "load_plan": ("cacheplan.plans.io", "read_plan"),
    "save_plan": ("cacheplan.plans.io", "write_plan"),
    **{
        name: ("cacheplan.api", name)
        for name in ("load_profile", "merge", "profile", "solve", "verify")
    },
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
