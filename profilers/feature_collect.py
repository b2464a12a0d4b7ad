"""Profile a diffusion model: every statistic of one calibration prompt, prompt after prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacheplan.adapters.calls import latent, sample, unwrapped, with_sample
from cacheplan.adapters.denoiser import Observation, locate
from cacheplan.adapters.loop import Loop, denoisers, watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.adapters.taps import tapped
from cacheplan.errors import ProfileError
from cacheplan.plans.compute import expert_ranges, halves
from cacheplan.profilers.collect import Progress
from cacheplan.profilers.feature_ablation import Hold, ablate, whole_site
from cacheplan.profilers.feature_gradients import gradient_changes
from cacheplan.profilers.feature_moments import LineErrors, Moments
from cacheplan.profilers.feature_observer import Look, SiteTaps, Take, model_delta, rows
from cacheplan.profilers.feature_prompts import PicturePrompt
from cacheplan.profilers.linear_statistics import LinearStatistics
from cacheplan.profilers.settings import FeatureSettings
from cacheplan.profilers.store import ProfileState
from cacheplan.profilers.text_constancy import TextConstancy
from cacheplan.types import FeatureSite

Found = dict[str, NDArray[np.float64]]
_ABLATED = ("final_error", "final_damage", "output_damage")
_TAILS = 8  # ranges from one block to the last that are measured
_HEADS = 4  # of these, what lies before one in the first quarter: online gates look at that


def feature_sites(seen: Observation) -> tuple[FeatureSite, ...]:
    """What is measured: parts, blocks, the ends and halves of all blocks, and the whole model.

    Ranges stay within one denoiser and where each block gets just what the one before returned.
    """
    spec = seen.spec
    end = len(spec.blocks)
    model = FeatureSite(part="model", first=0, last=end)
    whole = whole_site(spec)
    if whole.part == "branch":
        return (whole, model)
    parts = [
        FeatureSite(part=part.name, first=b, last=b + 1)
        for b, block in enumerate(spec.blocks)
        for part in block.parts
    ]
    ranges = {(b, b + 1) for b in range(end)}
    for blocks in expert_ranges(spec):
        start, stop = blocks.start, blocks.stop
        spread = np.linspace(start, stop, min(len(blocks), _TAILS), endpoint=False)
        tails = spread.astype(int).tolist()
        wide = {(first, stop) for first in (start, start + 1, *tails) if first < stop}
        wide |= {(half.first, half.last) for half in halves(blocks)}
        wide |= {(start, first) for first in tails if first - start <= len(blocks) // _HEADS}
        for first, last in wide:
            if all(b.path in seen.joined for b in spec.blocks[first + 1 : last]):
                ranges.add((first, last))
    deltas = [FeatureSite(part="delta", first=a, last=b) for a, b in sorted(ranges) if a < b]
    return (*parts, *deltas, whole, model)


def collect_features(
    pipe: Any,
    seen: Observation,
    call: dict[str, Any],
    prompts: Sequence[PicturePrompt],
    state: ProfileState,
    *,
    save: Callable[[ProfileState], None],
    progress: Progress | None = None,
) -> None:
    """Measure the prompts that `state` is responsible for and has not seen yet.

    `save` is called after every prompt, so an interrupted run loses at most one.
    """
    settings, total = state.settings, len(state.responsible)
    assert isinstance(settings, FeatureSettings)
    todo = [i for i in state.responsible if i not in state.done]

    def report(words: str) -> None:
        if progress:
            progress(len(state.done), total, words)

    for index in todo:
        prompt = prompts[index]
        report("watching features")
        found, full = _watch(pipe, seen, call, prompt, settings)
        if index < settings.ablate:
            tables: dict[str, list[NDArray[np.float64]]] = {name: [] for name in _ABLATED}
            size = _output_size(found, settings)
            for site in settings.probes:
                errors, changes = _ablate(pipe, seen, call, prompt, site, full, report)
                held = _held(found["gram"][settings.sites.index(site)])
                for table, row in zip(tables.values(), (errors, held, changes / size), strict=True):
                    table.append(row)
            found |= {name: np.stack(table) for name, table in tables.items()}
        if index < settings.gradients:
            report("following gradients")
            changes = gradient_changes(pipe, seen, call, prompt, settings.sites)
            found["held_change"] = changes / _output_size(found, settings)
        state.add(index, found)
        save(state)
    if progress:
        progress(total, total, "done")


def _output_size(found: Found, settings: FeatureSettings) -> float:
    """Mean square of the model's delta over the steps."""
    model = next(i for i, site in enumerate(settings.sites) if site.part == "model")
    return float(found["power"][model] * found["scale"] ** 2)


def _held(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[T]`: mean square of `F_t - F_{t-1}`, from `[T, lags + 1]`; 0 at the first step."""
    found = np.zeros(len(gram))
    found[1:] = np.maximum(gram[1:, 0] + gram[:-1, 0] - 2 * gram[1:, 1], 0)
    return found


def _watch(
    pipe: Any,
    seen: Observation,
    call: dict[str, Any],
    prompt: PicturePrompt,
    settings: FeatureSettings,
) -> tuple[Found, Tensor]:
    """One full run: the moments of every site, relative to its mean square over the steps."""
    spec = seen.spec
    size = spec.steps, settings.lags
    whole = whole_site(spec)
    moments = {
        (site, branch): Moments(*size, channels=site == whole)
        for site in settings.sites
        for branch in spec.branches
    }
    lines, modulated = LineErrors(*size), Moments(*size)
    latents, outputs = Moments(*size), {branch: Moments(*size) for branch in spec.branches}
    place: list[Loop] = []

    def take(site: FeatureSite, found: list[Tensor]) -> None:
        loop = place[0]
        branch = spec.branches[loop.index(spec.branches)]
        moments[site, branch].add(loop.step, rows(found, settings.tokens))

    def look(what: str, found: Tensor) -> None:
        loop = place[0]
        if loop.call == 0:  # where gates decide
            watched = lines if what == "output" else modulated
            watched.add(loop.step, rows([found], settings.tokens))

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = inner(*args, **kwargs)
        module, index = loop.module, loop.index(spec.branches)
        model = FeatureSite(part="model", first=0, last=len(spec.blocks))
        take(model, [model_delta(module, output, args, kwargs)])
        outputs[spec.branches[index]].add(loop.step, rows([sample(output)], settings.tokens))
        if index == 0:
            given = latent(module, args, kwargs)
            latents.add(loop.step, rows([given], settings.tokens))
        return output

    texts = TextConstancy(spec, lambda: place[0].index(spec.branches))
    linears = LinearStatistics(settings, lambda: place[0].step)
    with _watching(pipe, seen, settings.sites, take, on_call, place, look, texts, linears):
        full = run_pipeline(pipe, {**call, **prompt.call}, seed=prompt.seed).latent
    kept = [moments[whole, branch] for branch in spec.branches]
    power = _power(kept)
    tables: dict[str, list[NDArray[np.float64]]] = {"gram": [], "l1": [], "power": []}
    for site in settings.sites:
        own = [moments[site, branch] for branch in spec.branches]
        tables["gram"].append(_relative(_mean([m.gram for m in own])))
        tables["l1"].append(_relative(_mean([m.l1 for m in own])))
        tables["power"].append(np.array(_power(own) / power))
    stack = FeatureSite(part="delta", first=0, last=len(spec.blocks))
    ratio = stack if stack in settings.sites else whole
    gates = {"forecast_l1": lines.l1, "modulated_l1": modulated.l1}
    return {
        **{name: np.stack(table) for name, table in tables.items()},
        **({} if whole.part == "branch" else gates),  # a UNet has no first transformer block
        **({"text_constant": np.array(float(texts.constant))} if texts.found else {}),
        **linears.found(),
        "scale": np.array(power**0.5),
        "channel_gram": _mean([m.channel_gram for m in kept]) / power,
        "channel_mean": _mean([m.channel_mean for m in kept]) / power**0.5,
        "token_ratio": _mean([moments[ratio, branch].token_ratio for branch in spec.branches]),
        "latent_l1": latents.l1,
        "output_l1": _mean([m.l1 for m in outputs.values()]),
    }, full


def _mean(tables: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.mean(np.stack(tables), axis=0)
    return found


def _power(own: Sequence[Moments]) -> float:
    """The mean square of a feature over all steps."""
    found = float(_mean([moments.gram for moments in own])[:, 0].mean())
    if not 0 < found < np.inf:
        raise ProfileError(
            "A feature is zero, NaN or infinite throughout: check the model and profile it in "
            "float32 (--dtype float32)."
        )
    return found


def _relative(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divided by the mean of its lag 0, so that features of any size compare."""
    return table / float(table[:, 0].mean())


def _ablate(
    pipe: Any,
    seen: Observation,
    call: dict[str, Any],
    prompt: PicturePrompt,
    site: FeatureSite,
    full: Tensor,
    report: Callable[[str], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[T]` each: squared error of the final latent, and mean square change of the output."""
    changes = np.zeros(seen.spec.steps)
    hold = Hold(site)
    place: list[Loop] = []
    arguments = {**call, **prompt.call}
    known: dict[tuple[int, str], tuple[Any, Tensor]] = {}  # what runs have in common, by call

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hold.loop = loop
        key, until = (loop.step, loop.branch), hold.step or 0
        if loop.step < until - 1 and key in known:  # its feature is not held any more
            form, result = known[key]
            return with_sample(form, result.to(latent(loop.module, args, kwargs).device))
        output = inner(*args, **kwargs)
        if loop.step == until > 0:  # all before was as in the full run, and so is this
            hold.step = None
            true = model_delta(loop.module, inner(*args, **kwargs), args, kwargs)
            hold.step = until
            moved = model_delta(loop.module, output, args, kwargs) - true
            changes[until] += float(moved.double().square().mean()) / len(seen.spec.branches)
        if loop.step < until:
            result = sample(output).cpu().clone()
            known[key] = with_sample(output, result.new_zeros(())), result
        return output

    with _watching(pipe, seen, (site,), hold, on_call, place):
        errors = ablate(
            seen.spec,
            hold,
            lambda: run_pipeline(pipe, arguments, seed=prompt.seed),
            full,
            tick=lambda step: report(f"holding step {step} of {seen.spec.steps}"),
        )
    return errors, changes


@contextmanager
def _watching(
    pipe: Any,
    seen: Observation,
    sites: Sequence[FeatureSite],
    take: Take,
    on_call: Any,
    place: list[Loop],
    look: Look | None = None,
    texts: TextConstancy | None = None,
    linears: LinearStatistics | None = None,
) -> Iterator[None]:
    """Taps on all denoisers; `place` gets the loop."""
    with ExitStack() as stack:
        place.append(stack.enter_context(watching(pipe, on_call=on_call)))
        for name, module in denoisers(pipe).items():
            root = unwrapped(module)
            paths = {locate(pipe, name, path): path for path, _ in root.named_modules()}
            handlers = SiteTaps(seen, sites, take, look).handlers(paths)
            if texts:
                handlers |= texts.handlers(paths)
            if linears:  # beneath other taps of the same layers
                stack.enter_context(tapped(root, linears.handlers(paths)))
            stack.enter_context(tapped(root, handlers))
        stack.enter_context(torch.no_grad())
        yield
