"""Steps, branches and runs of the sampling loop, counted under diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cacheplan.adapters.clock import Clock
from cacheplan.adapters.loop import Loop, denoisers, watching
from cacheplan.errors import UnsupportedError

SCHEDULERS = {
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
}


def run(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    return torch.as_tensor(pipe(**call, generator=torch.Generator().manual_seed(3))[0])


class Diary:
    """What a loop said of every call."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.calls: list[tuple[int, str, str]] = []
        self.steps: list[tuple[int, int]] = []

    def on_start(self, loop: Loop) -> None:
        assert (loop.step, loop.call) == (0, 0)
        assert len(loop.sigmas) == loop.steps + 1
        self.runs.append(loop.run)

    def on_call(self, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append((loop.step, loop.denoiser, loop.branch))
        return inner(*args, **kwargs)

    def on_step(self, loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        self.steps.append((loop.step, loop.call))
        return inner(*args, **kwargs)

    def watching(self, pipe: Any) -> Any:
        return watching(pipe, on_start=self.on_start, on_call=self.on_call, on_step=self.on_step)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_are_counted_under_every_kind_of_scheduler(name: str, tiny_pipeline: Any) -> None:
    import diffusers

    pipe, call = tiny_pipeline("stable_diffusion")
    options = {**pipe.scheduler.config, **SCHEDULERS[name]}
    pipe.scheduler = getattr(diffusers, name).from_config(options)
    full = run(pipe, call)
    diary = Diary()
    with diary.watching(pipe) as loop:
        assert torch.equal(run(pipe, call), full)
    steps = len(pipe.scheduler.timesteps)
    assert steps == {"HeunDiscreteScheduler": 11, "PNDMScheduler": 7}.get(name, 6)
    assert loop.steps == steps
    assert diary.runs == [1]
    assert diary.calls == [(step, "unet", "call 0") for step in range(steps)]
    assert diary.steps == [(step, 1) for step in range(steps)]


def test_branches_have_the_names_the_pipeline_gives_them(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("wan")
    diary = Diary()
    with diary.watching(pipe):
        run(pipe, call)
    names = ["cond", "uncond"]
    assert diary.calls == [(step, "transformer", name) for step in range(6) for name in names]
    assert diary.steps == [(step, 2) for step in range(6)]


def test_experts_take_over(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("wan_experts")
    diary = Diary()
    with diary.watching(pipe):
        run(pipe, call)
    assert [name for step, name, branch in diary.calls if branch == "cond"] == (
        ["transformer"] * 3 + ["transformer_2"] * 3
    )


def test_branches_by_position() -> None:
    loop = Loop(None)
    loop.branch = "cond_uncond"
    assert loop.index(("all",)) == 0
    loop.branch, loop.call = "cond", 1  # in whichever order the pipeline calls
    assert loop.index(("uncond", "cond")) == 1
    for planned in (("all",), ("call 0", "call 1")):
        with pytest.raises(UnsupportedError, match='called for "cond" at step 0'):
            loop.index(planned)


def test_repeated_names_within_a_step_are_told_apart(tiny_pipeline: Any) -> None:
    pipe, _ = tiny_pipeline("wan")
    given = {
        "hidden_states": torch.ones(1, 4, 2, 4, 4),
        "encoder_hidden_states": torch.ones(1, 5, 24),
    }
    diary = Diary()
    with diary.watching(pipe), torch.no_grad():
        pipe.scheduler.set_timesteps(6)
        for name in ("cond", "uncond", "uncond"):
            with pipe.transformer.cache_context(name):
                pipe.transformer(**given, timestep=pipe.scheduler.timesteps[:1])
    assert [branch for *_, branch in diary.calls] == ["cond", "uncond", "uncond 1"]


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_an_aborted_run_leaves_nothing_behind(name: str, tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline(name)
    full = run(pipe, call)

    def stop(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        raise KeyboardInterrupt

    diary = Diary()
    with diary.watching(pipe):
        with pytest.raises(KeyboardInterrupt):
            run(pipe, {**call, "callback_on_step_end": stop})
        diary.calls.clear()
        assert torch.equal(run(pipe, call), full)
    assert diary.runs == [1, 2]
    assert diary.calls[0][0] == 0
    assert diary.calls[-1][0] == 5


def test_an_error_inside_a_call_leaves_no_name_behind(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("wan")

    def fail(loop: Loop, inner: Any, args: Any, kwargs: Any) -> Any:
        raise RuntimeError("stop")

    with watching(pipe, on_call=fail) as loop:
        with pytest.raises(RuntimeError, match="stop"):
            run(pipe, call)
        assert not loop._context


def test_a_late_start_is_refused(tiny_pipeline: Any) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

    pipe, call = tiny_pipeline("stable_diffusion")
    late = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    late.set_progress_bar_config(disable=True)
    call = {name: value for name, value in call.items() if name not in ("height", "width")}
    call |= {"image": torch.zeros(1, 4, 8, 8), "strength": 0.5}
    sentence = "The run starts at step 3 of 6, but plans hold for whole runs"
    for scheduler in (pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)):
        late.scheduler = scheduler
        with pytest.raises(UnsupportedError, match=sentence), watching(late):
            run(late, call)


def test_calls_outside_of_the_loop_are_refused(tiny_pipeline: Any) -> None:
    pipe, call = tiny_pipeline("pixart")
    with watching(pipe):
        with pytest.raises(UnsupportedError, match="outside of a sampling loop"):
            pipe.transformer(torch.ones(1, 4, 8, 8), timestep=torch.ones(1))
        run(pipe, call)
        with pytest.raises(UnsupportedError, match="outside of a sampling loop"):
            pipe.transformer(torch.ones(1, 4, 8, 8), timestep=torch.ones(1))
    pipe, call = tiny_pipeline("flux")
    sample, scheduler = torch.ones(1, 16, 16), pipe.scheduler
    scheduler.set_timesteps(6)
    with (
        watching(pipe),
        pytest.raises(UnsupportedError, match="steps without a call of the denoiser"),
    ):
        scheduler.step(sample, scheduler.timesteps[0], sample)


def test_pipelines_without_a_denoiser_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="object has none of transformer, transformer_2"):
        denoisers(object())


TIMES = [999.0, 800.0, 600.0, 400.0, 200.0]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (lambda t: t, torch.int64),
        (lambda t: t, torch.float32),
        (lambda t: t / 1000, torch.float32),
        (lambda t: t / 1000, torch.bfloat16),
        (lambda t: 0.001 * t, torch.float64),
        (lambda t: 1 - t / 1000, torch.float32),
        (lambda t: 1000 - t, torch.float32),
    ],
)
def test_forms_of_timesteps(form: Any, dtype: torch.dtype) -> None:
    given = [torch.tensor([0, form(t), form(t)]).to(dtype) for t in TIMES]  # given tokens have 0
    clock = Clock(TIMES, 1000)
    for step, timestep in enumerate(given):
        clock.check(step, timestep)
    clock = Clock(TIMES, 1000)
    clock.check(0, given[0])
    with pytest.raises(UnsupportedError, match="at step 1, where the scheduler has 800"):
        clock.check(1, given[2])
    with pytest.raises(UnsupportedError, match="starts at step 2 of 5"):
        Clock(TIMES, 1000).check(0, given[2])


def test_a_form_of_timesteps_that_is_not_known_is_not_checked() -> None:
    clock = Clock(TIMES, 1000)
    for step, value in enumerate((-1.5, -0.5, -9.0)):
        clock.check(step, torch.tensor(value))
    Clock(TIMES, 1000, scale=0.5).check(0, 499.5)
