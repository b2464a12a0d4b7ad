"""Descriptions of pipelines, and loading them."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheplan.adapters.denoiser import check_worth, denoisers, describe, load, locate, split
from cacheplan.adapters.flops import flop_counter, uncompiled
from cacheplan.adapters.loop import watching
from cacheplan.adapters.taps import tapped
from cacheplan.errors import InputError, UnsupportedError

ALL = (
    *("pixart", "flux", "flux2", "wan", "wan_experts", "sd3", "sd35", "stable_diffusion"),
    *("cogvideox", "hunyuan_video", "ltx", "qwen_image", "sana", "dit"),
)


def twice(call: dict[str, Any]) -> dict[str, Any]:
    """The call with every prompt given twice."""
    return {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_costs_add_up_to_what_is_counted(name: str, tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline(name)
    spec = describe(pipe, call)
    counted: dict[str, int] = defaultdict(int)

    def count(path: str, inner: Any, args: Any, kwargs: Any) -> Any:
        with flop_counter() as counter:
            output = inner(*args, **kwargs)
        counted[path] += counter.get_total_flops()
        return output

    with watching(pipe, on_call=lambda loop, *call: count("", *call)):
        pipe(**call)
    assert counted.pop("") == spec.steps * spec.cost
    with ExitStack() as stack:
        for block in spec.blocks:
            denoiser, path = split(pipe, block.path)
            handler = {path: partial(count, block.path)}
            stack.enter_context(tapped(denoisers(pipe)[denoiser], handler))
        pipe(**call)
    experts = 1 + len(spec.expert_starts)
    steps = spec.steps // experts  # of each
    assert counted == {block.path: steps * block.cost for block in spec.blocks}
    assert sum(block.cost for block in spec.blocks) < experts * spec.cost
    for block in spec.blocks:
        assert sum(part.cost for part in block.parts) <= block.cost


@pytest.mark.parametrize("name", ["pixart", "wan", "stable_diffusion"])
def test_descriptions_are_of_one_prompt(name: str, tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline(name)
    spec = describe(pipe, call)
    assert describe(pipe, twice(call)) == spec
    labels, _ = tiny_pipeline("dit")
    assert describe(labels, {"class_labels": [1, 2, 3]}).cost == (
        describe(labels, {"class_labels": [4]}).cost
    )


def test_what_a_description_says(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("wan_experts")
    spec = describe(pipe, {**call, "guidance_scale": 4.5}, "some/model")
    assert spec.id == "some/model"
    assert (spec.pipeline, spec.architecture) == ("WanPipeline", "WanTransformer3DModel")
    paths = [f"{denoiser}blocks.{i}" for denoiser in ("", "transformer_2.") for i in range(3)]
    assert [block.path for block in spec.blocks] == paths
    assert spec.branches == ("cond", "uncond")
    assert spec.expert_starts == (3,)
    assert spec.latent == (4, 2, 4, 4)
    assert len(spec.sigmas) == spec.steps + 1 == 7
    assert spec.sigmas == tuple(pipe.scheduler.sigmas.tolist())
    assert spec.blocks[0].size == 2 * 8 * 32  # branches, tokens, width
    assert [part.name for part in spec.blocks[0].parts] == ["attention", "cross_attention", "mlp"]
    call_settings = json.loads(spec.call)
    assert call_settings["guidance_scale"] == 4.5
    assert call_settings["num_frames"] == 5
    assert not {"prompt", "prompt_embeds", "generator", "output_type"} & set(call_settings)
    scheduler = json.loads(spec.scheduler)
    assert (scheduler["class"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 2.0)
    assert describe(pipe, call, "some/model").call != spec.call


def test_special_parts(tiny_pipeline: Any) -> None:
    def parts(name: str, block: int) -> list[str]:
        return [part.name for part in describe(*tiny_pipeline(name)).blocks[block].parts]

    assert parts("sd35", 0) == ["attention", "attention_2", "mlp", "mlp_context"]
    assert parts("sd3", -1) == ["attention", "mlp"]
    assert parts("flux", -1) == ["attention"]
    assert parts("flux2", -1) == ["fused"]
    assert parts("qwen_image", 0) == ["attention", "mlp", "mlp_context"]


def test_refiners_of_the_text_are_not_blocks(tiny_pipeline: Any) -> None:
    blocks = describe(*tiny_pipeline("hunyuan_video")).blocks
    assert {block.path.split(".")[0] for block in blocks} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }


def test_parts_called_several_times_are_left_out(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("pixart")
    pipe.transformer.transformer_blocks[1].set_chunk_feed_forward(2, 1)
    names = [[part.name for part in block.parts] for block in describe(pipe, call).blocks]
    assert names[1] == ["attention", "cross_attention"]
    assert names[0] == names[2] == [*names[1], "mlp"]


def test_describing_leaves_the_pipeline_as_it_was(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("wan_experts")

    def run() -> torch.Tensor:
        return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(3))[0])

    full = run()
    before = {name: dict(vars(thing)) for name, thing in _things(pipe).items()}
    describe(pipe, call)
    after = {name: dict(vars(thing)) for name, thing in _things(pipe).items()}
    assert {name: set(values) for name, values in after.items()} == {
        name: set(values) for name, values in before.items()
    }
    assert pipe._progress_bar_config == {"disable": True}
    assert torch.equal(run(), full)


def _things(pipe: Any) -> dict[str, Any]:
    return {"pipe": pipe, "scheduler": pipe.scheduler, **denoisers(pipe)}


def test_digests_tell_weights_apart_but_not_their_precision(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("pixart")
    spec = describe(pipe, call)
    assert describe(*tiny_pipeline("pixart")).digest == spec.digest
    pipe.to(torch.bfloat16)
    low = {
        n: v.bfloat16() if n.endswith("embeds") and v is not None else v for n, v in call.items()
    }
    assert describe(pipe, low) == spec
    with torch.no_grad():
        pipe.transformer.proj_out.weight[0, 0] += 1
    assert describe(pipe, low).digest != spec.digest


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_cost_the_same(whole: bool, tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("wan")
    call |= {"num_inference_steps": 2}
    spec = describe(pipe, call)
    torch._dynamo.reset()
    if whole:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    pipe(**call)
    assert describe(pipe, call) == spec
    with uncompiled(pipe.transformer), flop_counter() as counter:
        pipe(**call)
    assert counter.get_total_flops() == spec.steps * spec.cost


def test_calls_that_change_within_a_run_are_refused(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("sd3")
    with pytest.raises(UnsupportedError, match=r"The calls of the denoiser change at step \d"):
        describe(pipe, {**call, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6})


def test_short_runs_are_not_worth_a_plan(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("flux")
    check_worth(describe(pipe, call))
    short = describe(pipe, {**call, "num_inference_steps": 4})
    assert short.steps == 4
    with pytest.raises(UnsupportedError, match="takes 4 steps, of which nothing can be skipped"):
        check_worth(short)


def test_paths_name_the_later_denoisers(tiny_pipeline: Any) -> None:
    pipe, _ = tiny_pipeline("wan_experts")
    for denoiser, path in (
        ("transformer", "blocks.1"),
        ("transformer_2", "transformer_2.blocks.1"),
    ):
        assert locate(pipe, denoiser, "blocks.1") == path
        assert split(pipe, path) == (denoiser, "blocks.1")


def test_loading(tiny_pipeline: Any, tmp_path: Path) -> None:
    pipe, call = tiny_pipeline("dit")
    pipe.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    spec = describe(loaded, call, "x")
    assert spec == describe(pipe, call, "x")
    assert describe(loaded, call).id == str(tmp_path)
    assert replace(spec, id="") == replace(describe(loaded, call), id="")
    assert load(str(tmp_path), dtype="bfloat16").transformer.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("adapter", "package", "extra"),
    [("denoiser", "diffusers", "diffusion"), ("language", "transformers", "llm")],
)
def test_a_missing_package_is_told(
    adapter: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    module = import_module(f"cacheplan.adapters.{adapter}")
    with pytest.raises(InputError, match=rf"need the package {package}.*cacheplan\[{extra}\]"):
        module.load(None)


@pytest.mark.parametrize(
    ("name", "options"),
    [("no/such-model", {}), ("/no/such/folder", {}), (".", {"dtype": "float7"})],
)
def test_what_cannot_be_loaded_is_told(name: str, options: dict[str, str]) -> None:
    with pytest.raises(InputError) as error:
        load(name, device="cpu", **options)
    assert f'The pipeline "{name}" could not be loaded' in str(error.value)
    assert "\n" not in str(error.value)
