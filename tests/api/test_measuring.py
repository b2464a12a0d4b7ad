"""Prompts divided among processes, interrupted and taken up again: always the same bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from cacheplan.errors import CacheplanError, InputError, ProfileError
from cacheplan.measuring import Save, check_division, measure
from cacheplan.processes import ALONE, Processes, launched
from cacheplan.profilers.settings import KVSettings
from cacheplan.profilers.store import ProfileState, read_state, write_state
from cacheplan.types import KVAction, LanguageSpec, Profile

PROMPTS = 7
Work = Callable[[Processes], Any]


class EndedError(Exception):
    """A process is ended in the middle."""


def together(size: int, work: Work) -> list[Any]:
    """Run `work` as `size` processes (threads here); what each returns or raises."""
    store: Any = vars(dist)["HashStore"]()
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        try:
            found[rank] = work(Processes(rank, size, rank, store, group))
        except (CacheplanError, EndedError) as error:
            found[rank] = error.with_traceback(None)  # whose frames would keep the group open

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return found


@pytest.fixture
def settings(tiny_spec: LanguageSpec) -> KVSettings:
    return KVSettings(
        model=tiny_spec,
        candidates=(KVAction(keep=1.0),),
        keeps=(0.5, 1.0),
        probes=((0, 0),),
        ablate=2,
        prompts=PROMPTS,
        prompts_digest="sha256:0",
        seed=0,
        versions=(("cacheplan", "0"),),
    )


def collect(state: ProfileState, save: Save, report: Any, *, most: int = PROMPTS) -> None:
    for index in state.responsible:
        if index in state.done:
            continue
        if most == 0:
            raise EndedError
        report(0, 0, "measuring")
        state.add(index, {"damage": np.random.default_rng(index).random((3, 2, 1, 2))})
        save(state)
        most -= 1
    report(0, 0, "done")


@pytest.fixture
def whole(settings: KVSettings, tmp_path: Path) -> bytes:
    path = tmp_path / "whole.safetensors"
    measure(settings, (0, 1), path, collect)
    assert list(tmp_path.iterdir()) == [path]
    return path.read_bytes()


@pytest.mark.parametrize("sizes", [(2,), (2, 2), (3, 2, 1), (1, 3), (1, 2, 1, 4)])
def test_any_processes_go_on_with_what_others_left(
    settings: KVSettings, whole: bytes, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    out = tmp_path / "profile.safetensors"
    done = 0
    for size in sizes[:-1]:  # each is interrupted after one more prompt per process

        def interrupted(processes: Processes) -> Profile | None:
            return measure(
                settings,
                (0, 1),
                out,
                lambda *args: collect(*args, most=1),
                processes=processes,
            )

        if size == 1:
            with pytest.raises(EndedError):
                interrupted(ALONE)
        else:
            assert all(isinstance(error, EndedError) for error in together(size, interrupted))
        done += size
        parts = tmp_path.glob("profile.safetensors*.part")
        assert len(set().union(*(read_state(part).done for part in parts))) == done
    reports: list[tuple[int, int, str]] = []

    def work(processes: Processes) -> Profile | None:
        return measure(
            settings,
            (0, 1),
            out,
            collect,
            processes=processes,
            progress=lambda *args: reports.append(args),
        )

    found = [work(ALONE)] if sizes[-1] == 1 else together(sizes[-1], work)
    assert isinstance(found[0], Profile)
    assert found[1:] == [None] * (sizes[-1] - 1)
    assert out.read_bytes() == whole
    assert not list(tmp_path.glob("*.part"))
    counts = [count for count, _, _ in reports]
    assert counts == sorted(counts)
    assert counts[0] >= done
    assert {total for _, total, _ in reports} == {PROMPTS}


def test_joined_files_count_once(settings: KVSettings, whole: bytes, tmp_path: Path) -> None:
    """Killed between joining the files of all processes and removing them."""
    out = tmp_path / "profile.safetensors"
    for name, done in {"": (0, 1, 2), ".1": (1,), ".12": (2, 0)}.items():
        state = ProfileState(settings, done)
        collect(state, lambda state: None, lambda *args: None)
        write_state(state, tmp_path / f"{out.name}{name}.part")
    measure(settings, (0, 1), out, collect)
    assert out.read_bytes() == whole
    assert not list(tmp_path.glob("*.part"))


def test_another_run_at_the_same_files_is_noticed(settings: KVSettings, tmp_path: Path) -> None:
    out = tmp_path / "profile.safetensors"
    for name, done in {"": (0, 1), ".1": (1, 3)}.items():
        state = ProfileState(settings, done)
        collect(state, lambda state: None, lambda *args: None)
        write_state(state, tmp_path / f"{out.name}{name}.part")
    with pytest.raises(InputError, match="another run is writing"):
        measure(settings, (0, 1), out, collect)


def test_one_failure_ends_all_and_one_speaks(settings: KVSettings, tmp_path: Path) -> None:
    out = tmp_path / "profile.safetensors"
    speakers = []

    def work(processes: Processes) -> None:
        def failing(state: ProfileState, save: Save, report: Any) -> None:
            if processes.rank == 1:
                raise InputError("The second process fails.")
            collect(state, save, report)

        try:
            measure(settings, (0, 1), out, failing, processes=processes)
        except CacheplanError:
            if processes.speaks():
                speakers.append(processes.rank)
            raise

    first, second, third = together(3, work)
    assert str(second) == "The second process fails."
    assert isinstance(first, ProfileError)
    assert "Another process failed" in str(third)
    assert speakers == [1]
    assert not out.exists()


def test_a_folder_that_is_not_shared(settings: KVSettings, tmp_path: Path) -> None:
    """On two machines, each writes into a folder that the other does not see."""

    def work(processes: Processes) -> None:
        folder = tmp_path / str(processes.rank)
        folder.mkdir()
        measure(settings, (0, 1), folder / "p.safetensors", collect, processes=processes)

    first, second = together(2, work)
    assert "Another process failed" in str(first)
    assert isinstance(second, InputError)
    assert "in a folder that all machines share" in str(second)


def test_divided_twice_is_refused() -> None:
    check_division((1, 2), 1)
    with pytest.raises(InputError, match="divides prompts that 2 processes divide already"):
        check_division((1, 2), 1, Processes(0, 2))


def test_who_was_launched() -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert launched({}) is ALONE
    assert launched({"WORLD_SIZE": "4"}) is ALONE
    assert launched(one) is ALONE
    with pytest.raises(InputError, match="must be numbers"):
        launched(one | {"RANK": "first"})
    with pytest.raises(InputError, match="Process 1 of 2 could not meet the others"):
        launched({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})  # and no MASTER_ADDR


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    current: list[int] = []
    assert Processes(1, 4, 1).device(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert ALONE.device(None) is None
    assert Processes(3, 4, 1).device(None) == "cuda:1"
    assert Processes(3, 4, 1).device("cuda") == "cuda:1"
    assert Processes(3, 4, 3).device("cuda:0") == "cuda:0"
    assert current == [1, 1]
    with pytest.raises(InputError, match="--nproc-per-node 2"):
        Processes(3, 4, 3).device(None)
