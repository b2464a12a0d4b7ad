"""Effects told from gradients are those of holding a feature, to first order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cacheplan.adapters.denoiser import Observation, observe
from cacheplan.adapters.loop import Loop, denoisers, watching
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.adapters.taps import tapped
from cacheplan.errors import UnsupportedError
from cacheplan.profilers.feature_collect import feature_sites
from cacheplan.profilers.feature_gradients import gradient_changes, squares
from cacheplan.profilers.feature_observer import model_delta
from cacheplan.profilers.feature_prompts import picture_prompt
from cacheplan.types import FeatureSite

PROMPT = picture_prompt({}, 7)  # embeddings are in the call
SMALL = 1e-3


def changes_by_hand(pipe: Any, seen: Observation, call: dict[str, Any], site: FeatureSite) -> Any:
    """`[T]`: a site's feature is moved by the share `SMALL` of what holding it would change."""
    found = np.zeros(seen.spec.steps)
    before: dict[str, Tensor] = {}
    now: dict[str, Tensor] = {}
    block = seen.spec.blocks[site.first]
    parts = {part.name: f"{block.path}.{part.path}" for part in block.parts}
    shift = [False]
    place: list[Loop] = []

    def around(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, branch = inner(*args, **kwargs), place[0].branch
        assert isinstance(output, Tensor)
        value = output
        if site.part == "delta":
            value = output - (args[0] if args else kwargs["hidden_states"])
        if shift[0]:
            return output + SMALL * (before[branch] - value)
        now[branch] = value
        return output

    def on_call(loop: Loop, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = inner(*args, **kwargs)
        if loop.step:
            shift[0] = True
            moved = model_delta(loop.module, inner(*args, **kwargs), args, kwargs)
            shift[0] = False
            difference = moved.double() - model_delta(loop.module, output, args, kwargs).double()
            square = float((difference / SMALL).square().mean())
            found[loop.step] += square / len(seen.spec.branches)
        before.update(now)
        return output

    (root,) = denoisers(pipe).values()
    taps = {parts.get(site.part, block.path): around}
    with torch.no_grad(), watching(pipe, on_call=on_call) as loop, tapped(root, taps):
        place.append(loop)
        run_pipeline(pipe, {**call, **PROMPT.call}, seed=PROMPT.seed)
    return found


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_effects_are_those_of_small_changes(tiny_pipeline: Any, name: str, frozen: bool) -> None:
    """Estimates with 64 draws are right to 18 percent at a step, and better over all of them."""
    pipe, call = tiny_pipeline(name)
    pipe.transformer.double().requires_grad_(not frozen)
    seen = observe(pipe, call)
    sites = feature_sites(seen)
    full = run_pipeline(pipe, call, seed=PROMPT.seed).latent
    found = gradient_changes(pipe, seen, call, PROMPT, sites, draws=64)
    assert torch.equal(run_pipeline(pipe, call, seed=PROMPT.seed).latent, full)
    assert all(p.grad is None for p in pipe.transformer.parameters())
    last = len(seen.spec.blocks) - 1
    for part, first in (("attention", 0), ("mlp", last), ("delta", 0)):
        site = FeatureSite(part=part, first=first, last=first + 1)
        expected = changes_by_hand(pipe, seen, call, site)
        own = found[sites.index(site)]
        assert own[0] == expected[0] == 0
        assert (own[1:] > 0).all()
        assert own.sum() == pytest.approx(expected.sum(), rel=0.3)
    assert not found[sites.index(next(s for s in sites if s.part == "model"))].any()


def test_squares_of_a_linear_map() -> None:
    """Of a feature in two tensors, one of which the output does not depend on."""
    torch.manual_seed(1)
    A = torch.randn(5, 4, dtype=torch.float64)
    F, other = (torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    move = torch.randn(4, dtype=torch.float64)
    site = FeatureSite(part="attention", first=0, last=1)
    signs = torch.Generator().manual_seed(0)
    found = squares(A @ F, {site: [F, other]}, {site: [move, move]}, 4000, signs)
    assert found[site] == pytest.approx(float((A @ move).square().sum()), rel=0.1)


def test_experts_and_unets(tiny_pipeline: Any) -> None:
    """Nothing is compared across denoisers; a UNet is refused."""
    pipe, call = tiny_pipeline("wan_experts")
    seen = observe(pipe, call)
    sites = feature_sites(seen)
    found = gradient_changes(pipe, seen, call, PROMPT, sites, draws=1)
    (start,) = seen.spec.expert_starts
    assert not found[:, [0, start]].any()
    half = len(seen.spec.blocks) // 2
    first = [site.part == "mlp" and site.first < half for site in sites]
    assert (found[first, 1:start] > 0).all()
    assert not found[first, start:].any()
    pipe, call = tiny_pipeline("stable_diffusion")
    seen = observe(pipe, call)
    with pytest.raises(UnsupportedError, match=r"no transformer blocks .*: profile without --grad"):
        gradient_changes(pipe, seen, call, PROMPT, feature_sites(seen))


def test_what_has_no_gradient_is_refused_in_a_sentence() -> None:
    site = FeatureSite(part="attention", first=0, last=1)
    point = torch.zeros(2, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"^No gradient can be taken .*: profile without"):
        squares(torch.zeros(2), {site: [point]}, {site: [point]}, 1, torch.Generator())
