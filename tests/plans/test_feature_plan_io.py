from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import PlanError
from cacheplan.plans.io import digest, dumps, loads
from cacheplan.types import (
    Block,
    Budget,
    Certificate,
    DiffusionSpec,
    FeatureAction,
    FeatureDamage,
    FeatureEntry,
    FeaturePlan,
    FeatureSite,
    Gate,
    Part,
    Provenance,
    TextProjections,
)

DATA = Path(__file__).with_name("golden_features.json").read_bytes()
PLAN = loads(DATA, "plan.json")

positive = st.floats(0, 1, exclude_min=True)
natural = st.integers(0, 2**40)
counts = st.integers(1, 2**40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
losses = st.floats(0, allow_infinity=False)
names = st.sampled_from(["attention", "cross_attention", "mlp", "mlp_context", "étage"])
damages = st.none() | st.builds(
    FeatureDamage,
    error=losses,
    psnr=st.none() | numbers,
    ssim=st.none() | st.floats(-1, 1),
    lpips=st.none() | losses,
    prompts=natural,
    digest=st.none() | st.text(),
)


@st.composite
def actions(draw: st.DrawFn, part: str) -> FeatureAction:
    if part == "delta" and draw(st.booleans()):
        return FeatureAction(do="skip")
    channels = draw(st.integers(0, 3))
    vectors = st.lists(numbers, min_size=channels, max_size=channels).map(tuple)
    basis = draw(st.sampled_from(["hold", "taylor", "newton", "hermite", "fitted", "spline"]))
    order = 0 if basis == "hold" else draw(st.integers(0, 2))
    fitted = order + 1 if basis == "fitted" else 0
    return FeatureAction(
        do="forecast" if basis != "hold" else draw(st.sampled_from(["reuse", "forecast"])),
        order=order,
        basis=basis,
        weights=tuple(draw(st.lists(numbers, min_size=fitted, max_size=fitted))),
        scale=draw(numbers),
        shift=draw(numbers),
        channel_scale=draw(vectors),
        channel_shift=draw(st.just(()) | vectors),
    )


@st.composite
def sites(draw: st.DrawFn, blocks: tuple[Block, ...]) -> list[FeatureSite]:
    """What one step leaves out: nothing, all blocks at once, or ranges and parts side by side."""
    end = len(blocks)
    if draw(st.booleans()):
        whole = st.sampled_from(["hidden", "model"])
        return [FeatureSite(part=draw(whole), first=0, last=end)] if draw(st.booleans()) else []
    found, first = [], 0
    while first < end:
        kind = draw(st.sampled_from(["none", "parts", "delta", "branch"]))
        last = first + 1
        if kind == "parts":
            every = [part.name for part in blocks[first].parts]
            chosen = draw(st.lists(st.sampled_from(every), unique=True)) if every else []
            found += [FeatureSite(part=p, first=first, last=last) for p in sorted(chosen)]
        elif kind != "none":
            last = draw(st.integers(first + 1, end))
            found.append(FeatureSite(part=kind, first=first, last=last))
        first = last
    return found


@st.composite
def plans(draw: st.DrawFn) -> FeaturePlan:
    some = st.lists(st.text(), min_size=1, max_size=2, unique=True).map(tuple)
    texts = st.builds(TextProjections, paths=some, cost=natural, size=natural, given=natural)

    def part(name: str) -> Part:
        text = draw(st.none() | texts)
        cost = draw(natural) + (text.cost if text else 0)
        return Part(name=name, path=draw(st.text()), cost=cost, size=draw(natural), text=text)

    blocks = []
    for index in range(draw(st.integers(1, 3))):
        parts = tuple(part(name) for name in draw(st.lists(names, unique=True)))
        cost = sum(p.cost for p in parts) + draw(natural)
        blocks.append(Block(path=f"blocks.{index}", cost=cost, size=draw(natural), parts=parts))
    steps = draw(st.integers(1, 5))
    levels = st.lists(numbers, min_size=steps + 1, max_size=steps + 1).map(tuple)
    model = draw(
        st.builds(
            DiffusionSpec,
            blocks=st.just(tuple(blocks)),
            branches=st.sampled_from([("all",), ("cond", "uncond")]),
            steps=st.just(steps),
            sigmas=levels,
            expert_starts=st.just(()),
            cost=st.just(sum(block.cost for block in blocks) + 1),
            latent=st.lists(counts, min_size=1, max_size=3).map(tuple),
        )
    )
    entries = [
        FeatureEntry(site=site, step=step, action=draw(actions(site.part)))
        for step in range(1, steps)
        for site in draw(sites(model.blocks))
    ]
    gates = st.builds(
        Gate,
        signal=st.text(min_size=1),
        threshold=losses,
        accumulate=st.sampled_from(["none", "sum", "product"]),
        max_consecutive=st.none() | counts,
        warmup=natural,
        protect_last=natural,
        blocks=st.integers(1, len(blocks)),
        order=natural,
    )
    scales = st.lists(st.floats(0, 4), min_size=steps, max_size=steps).map(tuple)
    kept = draw(positive)
    return FeaturePlan(
        model=model,
        recipe=draw(st.text()),
        budget=Budget(asked=draw(st.text()), kept=kept, reached=kept * draw(st.floats(0, 1))),
        entries=tuple(entries),
        gate=draw(st.none() | gates),
        dt_scale=draw(st.just(()) | scales),
        text_once=any(part.text for b in blocks for part in b.parts) and draw(st.booleans()),
        certificate=draw(st.builds(Certificate, value=numbers, bound=st.none(), gap=st.none())),
        predicted=draw(damages),
        measured=draw(damages),
        provenance=draw(st.builds(Provenance)),
    )


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plans())
def test_feature_plans_round_trip(plan: FeaturePlan) -> None:
    data = dumps(plan)
    again = loads(data, "plan.json")
    assert again == plan
    assert dumps(again) == data


def test_golden_bytes_of_a_feature_plan() -> None:
    assert dumps(PLAN) == DATA
    assert digest(PLAN) == json.loads(DATA)["digest"]
    assert isinstance(PLAN, FeaturePlan)
    assert PLAN.entries[4].action.weights == (1.5, -0.5)
    assert PLAN.gate == Gate(signal="first_block", threshold=0.12, max_consecutive=2, warmup=1)


def test_a_truncated_feature_plan_is_never_read() -> None:
    for size in [*range(0, len(DATA) - 1, 37), len(DATA) - 2]:
        with pytest.raises(PlanError):
            loads(DATA[:size], "plan.json")


def test_edited_numbers_of_a_feature_plan_are_noticed() -> None:
    text = re.sub(r'"(\\.|[^"\\])*"', lambda match: "_" * len(match[0]), DATA.decode())
    places = [i for match in re.finditer(r"-?\d[\d.e+-]*", text) for i in range(*match.span())]
    assert len(places) > 150
    for place in places:
        for new in b"07e-":
            if DATA[place] != new:
                with pytest.raises(PlanError):
                    loads(DATA[:place] + bytes([new]) + DATA[place + 1 :], "plan.json")


def edit(old: str, new: str) -> Callable[[], bytes]:
    assert DATA.decode().count(old) == 1, old
    return lambda: DATA.replace(old.encode(), new.encode())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda: DATA[:-3], "the file ends in the middle"),
        (
            edit('"family": "diffusion"', '"family": "language"'),
            'the file has the unknown field "gate", expected family, model, recipe, budget',
        ),
        (
            edit('"warmup": 1', '"warm_up": 1'),
            'gate has the unknown field "warm_up", expected signal, threshold, accumulate, '
            "max_consecutive, warmup, protect_last, blocks, order, rescale; update cacheplan if "
            "the file is newer",
        ),
        (
            edit('"do": "skip"', '"do": "skip", "correction": null'),
            'entries[5].action has the unknown field "correction", expected do, order, basis',
        ),
        (
            edit('"part": "mlp", "first": 1, "last": 2}', '"part": "mlp", "first": 1}'),
            "entries[0].site.last is missing, expected an integer",
        ),
        (
            edit('"scale": 0.98', '"scale": NaN'),
            "entries[1].action.scale is NaN, expected a",
        ),
        (edit('"scale": 0.98', '"scale": 1.0'), "the file was changed after it was written"),
        (edit('"step": 6', '"step": 6.0'), "entries[5].step is 6.0, expected an integer"),
        (edit('  "steps": 8,\n', ""), "model.steps is missing, expected an integer"),
    ],
)
def test_feature_plans_are_refused(data: Callable[[], bytes], sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        loads(data(), "plan.json")
    assert str(caught.value).startswith(f"plan.json: {sentence}")
