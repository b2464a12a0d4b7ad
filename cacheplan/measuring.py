"""Write a profile so that it can be interrupted, divided and joined, whatever it measures.

Each process keeps what it has measured in a file of its own; exact sums make the profile's bytes
independent of who measured what, so any number of processes may go on where others stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cacheplan.errors import InputError
from cacheplan.processes import ALONE, Processes
from cacheplan.profilers.settings import Settings
from cacheplan.profilers.store import ProfileState, finish, merge, read_state, write_state
from cacheplan.types import Profile

if TYPE_CHECKING:
    from cacheplan.profilers.collect import Progress

Save = Callable[[ProfileState], None]
Collect = Callable[[ProfileState, Save, "Progress"], None]
_DONE = "prompts done"


def check_division(shard: tuple[int, int], ablate: int, processes: Processes = ALONE) -> None:
    """InputError for shards that do not exist or are divided twice, and for no ablation at all."""
    part, parts = shard
    if not 0 <= part < parts:
        raise InputError(
            f'The shard is "{part}/{parts}", expected i/n with i from 0 to n - 1, such as 0/2.'
        )
    if parts > 1 and processes.size > 1:
        raise InputError(
            f"--shard {part}/{parts} divides prompts that {processes.size} processes divide "
            "already: leave out --shard, or start one process per shard without torchrun."
        )
    if ablate < 1:
        raise InputError(f"--ablate is {ablate}, expected at least 1 prompt to ablate on.")


def measure(
    settings: Settings,
    shard: tuple[int, int],
    out: Path,
    collect: Collect,
    *,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Profile | None:
    """Let `collect` fill a profile and write it to `out`.

    Returns the profile, or None for a shard and in all processes but the first.  A run that was
    interrupted goes on where it stopped, in as many processes as there are now: the first keeps
    its part in `out` with the suffix `.part`, the one of rank r with `.r.part`.
    """
    part, parts = shard
    asked = range(part, settings.prompts, parts)
    common = ProfileState(settings, asked)  # what was measured before, by any process
    if processes.rank == 0:
        common = _join(settings, asked, out)
    processes.wait()
    if processes.rank > 0:
        _check_shared([_unfinished(out, 0)])
        common = _read(_unfinished(out, 0), settings, asked)
    left = [index for index in asked if index not in common.done]
    state = common if processes.rank == 0 else ProfileState(settings, ())
    state.responsible = left[processes.rank :: processes.size]
    own = _unfinished(out, processes.rank)
    write_state(state, own)  # an output that cannot be written is noticed before the work
    processes.wait()

    def report(done: int, total: int, what: str) -> None:  # of all processes, not of this one
        if progress and processes.rank == 0:
            progress(len(state.done) + processes.count(_DONE), len(asked), what)

    def save(current: ProfileState) -> None:
        write_state(current, own)
        processes.count(_DONE, 1 if processes.rank else 0)

    files = [_unfinished(out, rank) for rank in range(processes.size)]
    _check_shared(files)
    collect(state, save, report)
    processes.wait(meanwhile=lambda: report(0, 0, "waiting for other processes"))
    if processes.rank > 0:
        return None
    states = [state, *(_read(file, settings, asked) for file in files[1:])]
    whole = merge(states, [str(file) for file in files])
    write_state(whole, out)
    _remove(files)
    return finish(whole, str(out)) if parts == 1 else None


def _unfinished(out: Path, rank: int) -> Path:
    """Where the process of that rank keeps its part."""
    return out.with_name(f"{out.name}.{rank}.part" if rank else f"{out.name}.part")


def _join(settings: Settings, asked: Sequence[int], out: Path) -> ProfileState:
    """Join what earlier processes left, however many they were, into the first one's file."""
    first = _unfinished(out, 0)
    pattern = re.compile(re.escape(out.name) + r"\.\d+\.part")
    others = sorted(file for file in out.parent.glob("*.part") if pattern.fullmatch(file.name))
    found = _read(first, settings, asked) if first.exists() else ProfileState(settings, asked)
    for file in others:
        earlier = _read(file, settings, asked)
        if earlier.done <= found.done:
            continue  # joined before, by a run that ended before it could remove the file
        if earlier.done & found.done:
            raise InputError(
                f"{file} and {first} hold the same prompts, so another run is writing them: end "
                f"it, delete {file} and start again."
            )
        found = merge([found, earlier], [str(first), str(file)])
    write_state(found, first)
    _remove(others)
    return found


def _read(file: Path, settings: Settings, asked: Sequence[int]) -> ProfileState:
    earlier = read_state(file)
    if earlier.settings != settings or not earlier.done <= set(asked):
        raise InputError(
            f"{file} is an interrupted profile with other settings: delete it, or choose another "
            "--out."
        )
    return earlier


def _check_shared(files: Sequence[Path]) -> None:
    for file in files:
        if not file.exists():
            raise InputError(
                f"{file}, which another process wrote, is not seen from here: choose an --out in "
                "a folder that all machines share."
            )


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
