"""What gates look at, as the profiler measures it: the first block, in the first call of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from cacheplan.adapters.denoiser import observe
from cacheplan.adapters.sampling import run_pipeline
from cacheplan.profilers.feature_ablation import whole_site
from cacheplan.profilers.feature_collect import collect_features, feature_sites
from cacheplan.profilers.feature_prompts import digest, picture_prompt
from cacheplan.profilers.settings import FeatureSettings
from cacheplan.profilers.store import ProfileState, finish

PROMPTS = [picture_prompt({}, seed) for seed in (7, 8)]  # embeddings are in the call


@pytest.mark.parametrize("name", ["pixart", "flux", "wan", "stable_diffusion"])
def test_gate_statistics(tiny_pipeline: Any, name: str) -> None:
    """The block's output against lines, and the change of what its attention is given."""
    pipe, call = tiny_pipeline(name)
    seen = observe(pipe, call)
    settings = FeatureSettings(
        model=seen.spec,
        sites=feature_sites(seen),
        lags=5,
        tokens=4096,
        probes=(whole_site(seen.spec),),
        ablate=0,
        prompts=2,
        prompts_digest=digest(PROMPTS),
        seed=0,
        versions=(),
    )
    state = ProfileState(settings, range(2))
    collect_features(pipe, seen, call, PROMPTS, state, save=lambda state: None)
    found = finish(state, "profile").statistics
    if name == "stable_diffusion":  # a UNet has no first transformer block
        assert not {"forecast_l1", "modulated_l1"} & set(found)
        return
    spec = seen.spec
    block = pipe.transformer.get_submodule(spec.blocks[0].path)
    attention = next(part.path for part in spec.blocks[0].parts if part.name == "attention")
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []

    def after(module: Any, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[1])  # Flux: text first

    def before(module: Any, args: Any, kwargs: Any) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    block.register_forward_hook(after)
    block.get_submodule(attention).register_forward_pre_hook(before, with_kwargs=True)
    lines, changes = [], []
    for prompt in PROMPTS:
        outputs.clear()
        inputs.clear()
        run_pipeline(pipe, call, seed=prompt.seed)
        F = [value.double().numpy() for value in outputs[:: len(spec.branches)]]
        m = [value.double().numpy() for value in inputs[:: len(spec.branches)]]
        lines.append(np.abs(F[2] + 3 * (F[2] - F[1]) - F[5]).mean())
        changes.append([np.abs(m[4] - m[3]).mean(), np.abs(m[3]).mean()])
    assert found["forecast_l1"].mean[5, 3, 4] == pytest.approx(np.mean(lines), rel=1e-4)
    modulated = found["modulated_l1"].mean
    np.testing.assert_allclose(
        [modulated[4, 1], modulated[3, 0]], np.mean(changes, axis=0), rtol=1e-4
    )
