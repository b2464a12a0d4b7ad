"""What `compare` has measured: tables, plain values and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cacheplan.cli.facts import damage_facts
from cacheplan.cli.feature_tables import (
    decibels,
    picture_comparison,
    picture_facts,
    remarks,
)
from cacheplan.cli.numbers import ABSENT, number, percent
from cacheplan.cli.tables import comparison_table, table_of
from cacheplan.intervals import mean_interval
from cacheplan.types import FeaturePlan, Plan

if TYPE_CHECKING:
    from cacheplan.picture_verification import PictureVerification
    from cacheplan.verification import Verification


@dataclass(frozen=True)
class Arm:
    """One plan: its name, the budget for which it was solved here, or None for a plan file."""

    name: str
    budget: float | None
    plan: Plan
    found: Verification | PictureVerification

    @property
    def label(self) -> str:
        label = self.name if self.budget is None else f"{self.name} at {self.budget:g}"
        few = isinstance(self.plan, FeaturePlan) and self.plan.linears
        return f"{label} (simulated bits)" if few else label

    @property
    def damage(self) -> float:
        """KL per token, or the relative error of the final latent."""
        return _picture(self).damage.error if self.pictured else _text(self).damage.kl

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the damage over prompts."""
        found = _picture(self).error_per_prompt if self.pictured else _text(self).kl_per_prompt
        return mean_interval(found)

    @property
    def share(self) -> float:
        """Bytes or FLOPs that were measured, as a share of the full amount."""
        if self.pictured:
            return _picture(self).counted_flops / _picture(self).full_flops
        return _text(self).measured_bytes / _text(self).full_bytes

    @property
    def pictured(self) -> bool:
        return isinstance(self.plan, FeaturePlan)


def tables(arms: Sequence[Arm]) -> list[Table]:
    """One row per plan; of recipes at several budgets also one row per recipe."""
    found = {arm.label: arm for arm in arms}
    if arms[0].pictured:
        rows = [picture_comparison(list(found), [_picture(arm) for arm in arms])]
    else:
        rows = [comparison_table({label: _text(arm) for label, arm in found.items()})]
    budgets = list(dict.fromkeys(arm.budget for arm in arms if arm.budget is not None))
    return rows if len(budgets) < 2 else [*rows, _grid(arms, budgets)]


def footnotes(arms: Sequence[Arm]) -> list[Text]:
    """What the tables do not tell, and why."""
    return remarks([_picture(arm) for arm in arms]) if arms[0].pictured else []


def _grid(arms: Sequence[Arm], budgets: Sequence[float]) -> Table:
    """Damage, and what it means, of recipes at budgets."""
    words = "error, PSNR" if arms[0].pictured else "KL, recall"
    table = table_of(words, *(f"{budget:g}" for budget in budgets))
    solved = {(arm.name, arm.budget): arm for arm in arms if arm.budget is not None}
    for name in dict.fromkeys(name for name, _ in solved):
        own = [solved.get((name, budget)) for budget in budgets]
        table.add_row(name, *(ABSENT if arm is None else _cell(arm) for arm in own))
    return table


def _cell(arm: Arm) -> str:
    if arm.pictured:
        return f"{number(arm.damage)}, {decibels(_picture(arm).damage.psnr)}"
    return f"{number(arm.damage)}, {percent(_text(arm).damage.recall)}"


def facts(arm: Arm) -> dict[str, Any]:
    """Everything about one plan but its choices."""
    low, high = arm.interval
    own: dict[str, Any] = {
        "recipe": arm.plan.recipe,
        "budget": arm.plan.budget.asked,
        "predicted": damage_facts(arm.plan.predicted),
        "measured": damage_facts(arm.found.damage),
        "interval": [low, high],
    }
    if arm.pictured:
        return own | picture_facts(_picture(arm))
    text = _text(arm)
    return own | {
        "kl_per_prompt": list(text.kl_per_prompt),
        "planned_bytes": text.planned_bytes,
        "measured_bytes": text.measured_bytes,
        "full_bytes": text.full_bytes,
    }


def curves(arms: Sequence[Arm]) -> Mapping[str, list[tuple[float, float]]]:
    """Measured share and damage: a curve per recipe, a point per plan file."""
    found: dict[str, list[tuple[float, float]]] = {}
    for arm in arms:
        found.setdefault(arm.name, []).append((arm.share, arm.damage))
    return found


def _text(arm: Arm) -> Verification:
    from cacheplan.verification import Verification

    assert isinstance(arm.found, Verification)
    return arm.found


def _picture(arm: Arm) -> PictureVerification:
    from cacheplan.picture_verification import PictureVerification

    assert isinstance(arm.found, PictureVerification)
    return arm.found
