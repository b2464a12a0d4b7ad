"""The profile file: exact sums in safetensors, complete or one shard, resumable and mergeable.

All arrays are integer sums (see `exact_sum`), and the header holds one canonical JSON text, so
equal measurements give equal bytes however the work was divided or interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError, PlanError, ProfileError
from cacheplan.plans.codec import decode, encode
from cacheplan.profilers.exact_sum import ExactSum
from cacheplan.profilers.settings import AXES, FAMILIES, SIGNED, KVSettings, Settings
from cacheplan.types import FeatureProfile, KVProfile, Profile, Statistic

VERSION = 1


@dataclass(eq=False)
class ProfileState:
    """A profile under way: settings, the prompts it answers for, those done, and their sums."""

    settings: Settings
    responsible: Sequence[int]
    done: set[int] = field(default_factory=set)
    sums: dict[str, ExactSum] = field(default_factory=dict)

    def add(self, index: int, found: dict[str, NDArray[np.float64]]) -> None:
        for name, value in found.items():
            if name not in self.sums:
                self.sums[name] = ExactSum.zeros(value.shape)
        for name, value in found.items():
            self.sums[name].add(value, name)
        self.done.add(index)

    @property
    def complete(self) -> bool:
        return len(self.done) == self.settings.prompts


def dumps(state: ProfileState) -> bytes:
    """The file's bytes; the same for the same measurements."""
    header = {
        "version": VERSION,
        "family": state.settings.family,
        "settings": encode(type(state.settings), state.settings),
        "done": sorted(state.done),
        "counts": {name: total.count for name, total in sorted(state.sums.items())},
    }
    tensors = {name: np.ascontiguousarray(total.parts) for name, total in state.sums.items()}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return save_tensors(tensors, metadata={"cacheplan": text})


def write_state(state: ProfileState, path: Path) -> None:
    atomic_write(path, dumps(state))


def read_state(path: Path) -> ProfileState:
    """Read a profile, complete or not; raises ProfileError or InputError with one sentence."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): run `cacheplan profile` first."
        ) from error
    try:
        tensors = load_tensors(data)
        text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header = json.loads(text["__metadata__"]["cacheplan"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ProfileError(
            f"{path} is truncated or no cacheplan profile: run `cacheplan profile` again."
        ) from error
    return _state(header, tensors, path)


def _state(header: Any, tensors: dict[str, NDArray[Any]], path: Path) -> ProfileState:
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise ProfileError(
            f"{path} has profile version {_version(header)}, but this release reads {VERSION}: "
            "run `cacheplan profile` again."
        )
    try:
        settings: Settings = decode(FAMILIES[header["family"]], header["settings"], str(path))
        counts, done = header["counts"], header["done"]
        sums = {name: ExactSum(int(counts[name]), part) for name, part in tensors.items()}
    except (PlanError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{path} has a damaged header ({error}): run `cacheplan profile` again."
        ) from error
    for name, total in sums.items():
        axes = AXES.get(name)
        if axes is None or total.parts.dtype != np.int64 or total.parts.ndim != len(axes) + 1:
            raise ProfileError(
                f'{path} holds the unexpected array "{name}": run `cacheplan profile` again.'
            )
        if total.count < 1 or (name not in SIGNED and (total.parts[0] < 0).any()):
            raise ProfileError(
                f'{path}: the statistic "{name}" is negative or empty, so the file was changed: '
                "run `cacheplan profile` again."
            )
    if not set(done) <= set(range(settings.prompts)):
        raise ProfileError(f"{path} lists prompts it cannot have: run `cacheplan profile` again.")
    return ProfileState(settings, range(settings.prompts), set(done), sums)


def _version(header: Any) -> Any:
    return header.get("version") if isinstance(header, dict) else None


def merge(states: Sequence[ProfileState], names: Sequence[str]) -> ProfileState:
    """Add up shards; raises InputError if they differ in settings or overlap."""
    first = states[0]
    merged = ProfileState(first.settings, range(first.settings.prompts))
    for state, name in zip(states, names, strict=True):
        if state.settings.family != first.settings.family:
            raise InputError(
                f"{name} is the profile of a {state.settings.family} model, {names[0]} that of a "
                f"{first.settings.family} model: merge only shards of one profile."
            )
        for key, value in asdict(state.settings).items():
            if value != asdict(first.settings)[key]:
                raise InputError(
                    f'{name} was profiled with another "{key}" than {names[0]}: merge only shards '
                    "of one profile."
                )
        twice = merged.done & state.done
        if twice:
            raise InputError(
                f"{name} repeats prompt {min(twice)}, which an earlier shard holds: give every "
                "shard once."
            )
        merged.done |= state.done
        for key, total in state.sums.items():
            merged.sums.setdefault(key, ExactSum.zeros(total.parts.shape[1:])).merge(total)
    return merged


def finish(state: ProfileState, where: str) -> Profile:
    """The profile that solvers read; raises ProfileError while prompts are missing."""
    settings = state.settings
    if not state.complete:
        missing = settings.prompts - len(state.done)
        raise ProfileError(
            f"{where} lacks {missing} of {settings.prompts} prompts: run the same "
            "`cacheplan profile` command again, or `cacheplan merge` its shards."
        )
    statistics = {
        name: Statistic(AXES[name], total.count, total.mean(), total.std())
        for name, total in sorted(state.sums.items())
    }
    common: dict[str, Any] = {
        "statistics": statistics,
        "prompts": settings.prompts,
        "prompts_digest": settings.prompts_digest,
        "seed": settings.seed,
        "digest": "sha256:" + hashlib.sha256(dumps(state)).hexdigest(),
        "versions": settings.versions,
    }
    if isinstance(settings, KVSettings):
        return KVProfile(
            model=settings.model,
            keeps=settings.keeps,
            candidates=settings.candidates,
            probes=settings.probes,
            keys=settings.keys,
            values=settings.values,
            demoted=settings.demoted,
            joint=settings.joint,
            **common,
        )
    return FeatureProfile(
        model=settings.model,
        sites=settings.sites,
        lags=settings.lags,
        probes=settings.probes,
        linears=settings.linears,
        readers=settings.readers,
        **common,
    )
