"""Processes that share one work, as `torchrun` starts them: who each is, and how they meet.

Nothing is computed across processes: each leaves exact files (`cacheplan.measuring`).  They only
wait for each other, count, and agree on who speaks when something fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cacheplan.errors import InputError, ProfileError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_START = timedelta(minutes=10)  # for all processes to come
_WORK = timedelta(days=30)  # shares of the prompts may end hours apart
_POLL = 0.1  # seconds
_FAILED = "failed"


@dataclass(frozen=True)
class Processes:
    """One process (`rank`) of `size`; without arguments, a process that works alone.

    `local` counts the processes of this machine.  `group` is a gloo process group and `store` the
    key-value store beneath it.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: Any = None
    group: Any = None

    def device(self, asked: str | None) -> str | None:
        """The GPU of this process, unless another device is asked for; it becomes the current one.

        Raises InputError if there are more processes than GPUs.
        """
        import torch

        if self.size == 1 or asked not in {None, "cuda"} or not torch.cuda.is_available():
            return asked
        gpus = torch.cuda.device_count()
        if self.local >= gpus:
            raise InputError(
                f"This machine shows {gpus} GPU{'s' * (gpus > 1)} but runs more processes: start "
                f"{gpus} of them (--nproc-per-node {gpus}), or name a --device for all."
            )
        torch.cuda.set_device(self.local)  # Triton starts its kernels on the current device
        return f"cuda:{self.local}"

    def count(self, name: str, more: int = 0) -> int:
        """Add `more` to a number that all processes share, and return it; alone, always 0."""
        if self.size == 1:
            return 0
        with _connected():
            return int(self.store.add(name, more))

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return once every process has come here; raises ProfileError if one has ended.

        `meanwhile` is called again and again until then.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        options = dist.BarrierOptions()
        options.timeout = _WORK
        with _connected():
            meeting = self.group.barrier(options)
            while not meeting.is_completed():
                meanwhile()
                time.sleep(_POLL)
            meeting.wait()

    def speaks(self) -> bool:
        """Whether this process, which fails, is the first to fail and so the one to say why."""
        if self.size == 1:
            return True
        try:
            first = self.store.compare_set(_FAILED, "", str(self.rank))
        except RuntimeError:  # the store went down with the processes: nobody else may be left
            return True
        return int(first) == self.rank


ALONE = Processes()


def launched(environment: Mapping[str, str] = os.environ) -> Processes:
    """This process among those that torchrun, or a launcher with the same variables, started.

    Raises InputError if the variables are wrong or the other processes do not come.
    """
    if not all(environment.get(name) for name in _VARIABLES):
        return ALONE
    try:
        rank, size, local = (int(environment[name]) for name in _VARIABLES)
    except ValueError as error:
        raise InputError(
            f"{', '.join(_VARIABLES)} must be numbers, as torchrun sets them ({error}): unset "
            "them to profile in one process."
        ) from error
    if size == 1:
        return ALONE
    import torch.distributed

    dist: Any = torch.distributed  # its stubs lack what follows
    try:
        found, _, _ = next(dist.rendezvous("env://", rank, size, timeout=_START))
        store = dist.PrefixStore("cacheplan", found)
        group = dist.ProcessGroupGloo(store, rank, size, _START)
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"Process {rank} of {size} could not meet the others ({reason}): start them with "
            "torchrun, or unset RANK and WORLD_SIZE to profile in one process."
        ) from error
    return Processes(rank, size, local, store, group)


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a lost connection into a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise _gone() from error


def _gone() -> ProfileError:
    return ProfileError(
        "Another process failed or was ended: its own words say why; finished prompts are kept, "
        "run the same command to go on."
    )
