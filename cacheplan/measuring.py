"""Write a profile so that it can be interrupted, divided and joined, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cacheplan.errors import InputError
from cacheplan.profilers.settings import Settings
from cacheplan.profilers.store import ProfileState, finish, read_state, write_state
from cacheplan.types import Profile

Save = Callable[[ProfileState], None]


def check_division(shard: tuple[int, int], ablate: int) -> None:
    """InputError for shards that do not exist and for profiles without any ablation."""
    part, parts = shard
    if not 0 <= part < parts:
        raise InputError(
            f'The shard is "{part}/{parts}", expected i/n with i from 0 to n - 1, such as 0/2.'
        )
    if ablate < 1:
        raise InputError(f"--ablate is {ablate}, expected at least 1 prompt to ablate on.")


def measure(
    settings: Settings,
    shard: tuple[int, int],
    out: Path,
    collect: Callable[[ProfileState, Save], None],
) -> Profile | None:
    """Let `collect` fill a profile and write it to `out`; the profile, or None for a shard.

    A run that was interrupted goes on where it stopped (`out` with the suffix `.part`).
    """
    part, parts = shard
    state = ProfileState(settings, range(part, settings.prompts, parts))
    unfinished = out.with_name(out.name + ".part")
    if unfinished.exists():
        earlier = read_state(unfinished)
        if earlier.settings != settings or not earlier.done <= set(state.responsible):
            raise InputError(
                f"{unfinished} is an interrupted profile with other settings: delete it, or "
                "choose another --out."
            )
        state.done, state.sums = earlier.done, earlier.sums
    write_state(state, unfinished)  # an output that cannot be written is noticed before the work
    collect(state, lambda current: write_state(current, unfinished))
    write_state(state, out)
    unfinished.unlink(missing_ok=True)
    return finish(state, str(out)) if parts == 1 else None
