"""`cacheplan solve`: the best plan under a budget."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cacheplan import api
from cacheplan.cli.facts import plan_facts, plan_words
from cacheplan.cli.options import PLAN, PROFILE, Json
from cacheplan.cli.output import emit, suggest


def solve(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="The file of `cacheplan profile`.")
    ] = PROFILE,
    *,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            metavar="BUDGET",
            help='What is kept: "0.2" or "20%" of the cache or of the computation, or "5x" less; '
            'of a KV cache also "512tok" per head, "2GiB" or "3.2bits".',
        ),
    ],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME", help="See `cacheplan recipes`.")
    ] = "planned",
    solver: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For the language recipe planned; milp if not given."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Prompt length that absolute budgets refer to; the profile's mean if not given.",
        ),
    ] = None,
    decode_every: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Cut back every so many new tokens; else the recipe."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The plan to write.")
    ] = PLAN,
    as_json: Json = False,
) -> None:
    """Find the best cache plan under a budget.

    \b
    Examples:
      cacheplan solve --budget 0.2
      cacheplan solve --budget 512tok --recipe snapkv --out snapkv.json
      cacheplan solve pictures.safetensors --budget 2.5x --recipe taylorseer
    """
    command = ["cacheplan", "solve", str(profile), "--budget", budget, "--recipe", recipe]
    if solver is not None:
        command += ["--solver", solver]
    if length is not None:
        command += ["--length", str(length)]
    if decode_every is not None:
        command += ["--decode-every", str(decode_every)]
    plan = api.solve(
        api.load_profile(profile),
        budget=budget,
        recipe=recipe,
        solver=solver,
        length=length,
        decode_every=decode_every,
        command=shlex.join(command),  # without --out: where a plan lies does not change it
    )
    api.save_plan(plan, out)
    if as_json:
        emit({"file": str(out), **plan_facts(plan)})
    else:
        print("\n".join([f"{out}: {plan.recipe} for {plan.model.id}", *plan_words(plan)]))
    suggest(f"cacheplan run --plan {out}")
