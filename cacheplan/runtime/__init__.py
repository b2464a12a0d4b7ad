"""Apply a plan at inference; serving imports torch, the plan and the kernels, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cacheplan.runtime.cache import PlanCache
    from cacheplan.runtime.install import apply

__all__ = ["PlanCache", "apply"]


def __getattr__(name: str) -> Any:
    # transformers is imported only once a plan is really applied to one of its models
    if name == "apply":
        from cacheplan.runtime.install import apply

        return apply
    if name == "PlanCache":
        from cacheplan.runtime.cache import PlanCache

        return PlanCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
