"""Rules and words that plans of all families share."""

from __future__ import annotations

from typing import NoReturn

from cacheplan.errors import ModelMismatchError, PlanError, UnsupportedError
from cacheplan.plans.codec import show
from cacheplan.types import Budget, Certificate, ModelSpec

SHARE = "a number from 0 to 1"
COUNT = "an integer of at least 1"
NATURAL = "an integer of at least 0"
POSITIVE = "a number of at least 0"

# what the runtime for features knows
RANGES = ("delta", "hidden", "model", "branch")  # features of several blocks
PARTS = (
    *("attention", "attention_2", "cross_attention", "mlp", "mlp_context"),
    *RANGES,
)
BASES = ("hold", "taylor", "newton", "hermite", "fitted")
SIGNALS = ("first_block", "forecast", "modulation", "secant")


def need(holds: bool, path: str, value: object, expected: str) -> None:
    """PlanError naming the field, its value and what it should be, unless `holds`."""
    if not holds:
        raise PlanError(f"{path} is {show(value)}, expected {expected}")


def one_of(words: tuple[str, ...], path: str, value: str) -> None:
    need(value in words, path, value, "one of " + ", ".join(words))


def refuse(path: str, value: object, supported: str) -> NoReturn:
    raise UnsupportedError(
        f"{path} is {show(value)}, which cannot be run yet; supported is {supported}"
    )


def check_budget(budget: Budget) -> None:
    need(0 < budget.kept <= 1, "budget.kept", budget.kept, "a number above 0 and at most 1")
    fits = 0 <= budget.reached <= budget.kept + 1e-9
    need(fits, "budget.reached", budget.reached, f"a number from 0 to the budget {budget.kept}")


def check_certificate(certificate: Certificate) -> None:
    gap = certificate.gap
    need(gap is None or gap >= 0, "certificate.gap", gap, POSITIVE)


def same_model(
    plan: ModelSpec, found: ModelSpec, ours: dict[str, object], theirs: dict[str, object]
) -> None:
    """ModelMismatchError naming the first thing of `ours` that differs in `theirs`."""
    for name in dict.fromkeys((*ours, *theirs)):
        expected, value = ours.get(name, "absent"), theirs.get(name, "absent")
        if value != expected:
            raise ModelMismatchError(
                f"the plan was made for {plan.id}, whose {name} is {expected}, but that of "
                f"{found.id} is {value}; load the plan's model or profile {found.id} and "
                "solve again"
            )
