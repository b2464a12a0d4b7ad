from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheplan.errors import InputError, PlanError
from cacheplan.plans import io
from cacheplan.plans.check import kv_only
from cacheplan.plans.io import digest, dumps, loads, read_plan, write_plan
from cacheplan.types import (
    SCORERS,
    Budget,
    Certificate,
    Damage,
    Entry,
    KVAction,
    KVPlan,
    LanguageSpec,
    Merge,
    Precision,
    Provenance,
    Scorer,
    Site,
    Tier,
    Trigger,
    WeightAction,
    WindowAttention,
)

GOLDEN = Path(__file__).with_name("golden_plan.json")
DATA = GOLDEN.read_bytes()
PLAN = kv_only(loads(DATA, "plan.json"), "test")

shares = st.floats(0, 1)
positive = st.floats(0, 1, exclude_min=True)
natural = st.integers(0, 2**40)
counts = st.integers(1, 2**40)
losses = st.floats(0, allow_infinity=False)
numbers = st.floats(allow_nan=False, allow_infinity=False)
windows = st.builds(
    WindowAttention,
    window=counts,
    pool=st.integers(0, 9).map(lambda half: 2 * half + 1),
    pooling=st.sampled_from(["average", "max"]),
)
scorers: st.SearchStrategy[Scorer] = st.one_of(
    windows, *(st.builds(cls) for cls in SCORERS.values() if cls is not WindowAttention)
)
precisions = st.builds(
    Precision,
    format=st.sampled_from(["model", "int", "float"]),
    bits=st.integers(1, 32),
    axis=st.sampled_from(["tensor", "token", "channel"]),
    group=st.none() | counts,
    residual=natural,
)
losers: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(dict, losers=st.sampled_from(["evict", "offload"])),
    st.builds(
        dict,
        losers=st.just("merge"),
        merge=st.builds(
            Merge,
            to=st.sampled_from(["nearest", "similar"]),
            similarity=shares,
            sigma=st.sampled_from(["distance", "weights"]),
        ),
    ),
    st.builds(
        dict, losers=st.just("demote"), low=st.builds(Tier, key=precisions, value=precisions)
    ),
)
kv = st.builds(
    lambda loses, **fields: KVAction(**fields, **loses),
    loses=losers,
    keep=positive,
    scorer=scorers,
    sinks=natural,
    recent=natural,
    recent_share=shares,
    floor=shares,
    key=precisions,
    value=precisions,
    rank=st.none() | counts,
)
damages = st.none() | st.builds(
    Damage,
    kl=losses,
    agreement=st.none() | shares,
    full_recall=st.none() | shares,
    nll=st.none() | losses,
    prompts=natural,
    digest=st.none() | st.text(),
)


@st.composite
def plans(draw: st.DrawFn) -> KVPlan:
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kinds = st.lists(st.sampled_from(["full_attention", "étage"]), min_size=layers, max_size=layers)
    model = draw(
        st.builds(
            LanguageSpec,
            id=st.text(),
            layer_kinds=kinds.map(lambda some: ("full_attention", *some[1:])),
            query_heads=counts,
            kv_heads=st.just(heads),
            key_width=counts,
            value_width=counts,
            max_length=counts,
        )
    )
    entries: list[Entry] = []
    for layer in range(layers):
        if layer not in model.planned:
            pass
        elif draw(st.booleans()):
            action = draw(kv)
            changes: Any = draw(st.sampled_from([{}, {"share": "layer"}, {"split": "adaptive"}]))
            entries.append(Entry(site=Site(layer=layer), action=replace(action, **changes)))
        else:
            for head in range(heads):
                entries.append(Entry(site=Site(layer=layer, head=head), action=draw(kv)))
        if draw(st.booleans()):
            site = Site(layer=layer, target="weight")
            weights = st.builds(WeightAction, weight=precisions, activation=precisions)
            entries.append(Entry(site=site, action=draw(weights)))
    kept = draw(positive)
    return KVPlan(
        model=model,
        recipe=draw(st.text()),
        budget=Budget(
            asked=draw(st.text()),
            kept=kept,
            reached=kept * draw(shares),
            length=draw(counts),
            max_rows=draw(st.none() | counts),
        ),
        entries=tuple(entries),
        trigger=Trigger(decode_every=draw(st.none() | counts)),
        certificate=draw(
            st.builds(
                Certificate,
                value=numbers,
                bound=st.none() | numbers,
                gap=st.none() | losses,
            )
        ),
        predicted=draw(damages),
        measured=draw(damages),
        provenance=draw(st.builds(Provenance)),
    )


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plans())
def test_round_trip(plan: KVPlan) -> None:
    data = dumps(plan)
    again = loads(data, "plan.json")
    assert again == plan
    assert dumps(again) == data


def test_golden_bytes(tmp_path: Path) -> None:
    assert dumps(PLAN) == DATA
    lines = DATA.splitlines(keepends=True)
    plain = hashlib.sha256(b"".join(lines[:3] + lines[4:]))  # sed 4d plan.json | sha256sum
    assert digest(PLAN) == json.loads(DATA)["digest"] == "sha256:" + plain.hexdigest()
    write_plan(PLAN, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == DATA
    assert read_plan(tmp_path / "plan.json") == PLAN
    assert os.listdir(tmp_path) == ["plan.json"]


def test_the_specification_shows_plans_that_can_be_read() -> None:
    spec = Path(__file__).parents[2] / "plans" / "SPEC.md"
    examples = re.findall(r"```json\n(.*?)```", spec.read_text("utf-8"), re.DOTALL)
    features = GOLDEN.with_name("golden_features.json")
    assert [example.encode() for example in examples] == [DATA, features.read_bytes()]


def test_line_ends_and_indentation_may_be_converted() -> None:
    assert loads(DATA.replace(b"\n", b"\r\n"), "plan.json") == PLAN
    assert loads(DATA.replace(b"    ", b"\t"), "plan.json") == PLAN


def test_equal_plans_give_identical_bytes() -> None:
    budget = replace(PLAN.budget, kept=1, reached=0)
    plan = replace(PLAN, budget=budget)
    assert dumps(plan) == dumps(replace(PLAN, budget=replace(budget, kept=1.0, reached=0.0)))


def edit(old: str, new: str) -> Callable[[], bytes]:
    assert DATA.decode().count(old) == 1, old
    return lambda: DATA.replace(old.encode(), new.encode())


CHANGED = "the file was changed after it was written, its digest no longer fits; solve again"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda: b"", "the file is empty, expected a plan; solve again"),
        (lambda: b" \n", "the file is empty, expected a plan; solve again"),
        (
            lambda: b"{}" + b" " * 2**26,
            "the file is larger than 64 MiB, expected a plan; check the path",
        ),
        (
            lambda: b"\x08\x00\xff\x00{}",
            "the file is not text (byte 0xff at 2), expected a plan; "
            "if it is a profile, run `cacheplan solve` on it",
        ),
        (
            lambda: b"keep: 0.2",
            "the file is not JSON (line 1, column 1: Expecting value), expected a plan; "
            "check the path or solve again",
        ),
        (
            lambda: DATA + b"{}",
            "the file is not JSON (line 59, column 1: Extra data), expected a plan; "
            "check the path or solve again",
        ),
        (
            lambda: DATA[:500],
            "the file ends in the middle (line 16), expected a whole plan; "
            "copy it again or solve again",
        ),
        (
            lambda: b"[" * 10**5 + b"]" * 10**5,
            "the file holds a number too long or lists too deep for a plan; solve again",
        ),
        (
            lambda: b"1" * 5000,
            "the file holds a number too long or lists too deep for a plan; solve again",
        ),
        (lambda: b"[]", "the file is JSON without a format, expected a plan; check the path"),
        (lambda: b"{}", "the file is JSON without a format, expected a plan; check the path"),
        (
            edit('"format": "cacheplan"', '"format": "gguf"'),
            'format is "gguf", expected "cacheplan"; check the path',
        ),
        (
            edit('"version": 1', '"version": 2'),
            "version is 2, expected 1; update cacheplan or solve again",
        ),
        (edit('"version": 1', '"version": true'), "version is true, expected an integer or null"),
        (
            edit('  "version": 1,\n', ""),
            "version is null, expected 1; update cacheplan or solve again",
        ),
        (
            edit('"version": 1', '"version": 1, "version": 1'),
            "version appears twice in the same object, expected once",
        ),
        (edit('"digest": "sha256:c', '"digest": "sha256:0'), CHANGED),
        (edit('"digest": "sha256:c', '"digests": "sha256:f'), "digest is null, expected text"),
        (edit('"layer": 0, "head": 0', '"head": 0, "layer": 0'), CHANGED),
        (edit('"layer": 0, "head": 0', '"layer": 0, "target": "kv", "head": 0'), CHANGED),
        (edit("optimal within", "optimal  within"), CHANGED),
        (edit('"reached": 0.3999', '"reached": 0.39990'), CHANGED),
        (edit('"reached": 0.3999', '"reached": 0'), CHANGED),
        (
            edit('  "family": "language",\n', ""),
            "family is missing, expected one of language, diffusion",
        ),
        (
            edit('"family": "language"', '"family": "vision"'),
            'family is "vision", expected one of language, diffusion; '
            "update cacheplan if the file is newer",
        ),
        (
            edit('"family": "language"', '"family": "diffusion"'),
            'the file has the unknown field "trigger", expected family, model, recipe, budget, '
            "entries, gate, dt_scale, text_once, linears, certificate, predicted, measured, "
            "provenance; "
            "update cacheplan if the file is newer",
        ),
        (edit("0.7", '"a"'), 'entries[0].action.keep is "a", expected a number'),
        (edit("0.7", "NaN"), "entries[0].action.keep is NaN, expected a finite number"),
        (edit("0.7", "1e999"), "entries[0].action.keep is Infinity, expected a finite number"),
        (edit("0.7", "true"), "entries[0].action.keep is true, expected a number"),
        (
            edit('"keep": 0.7', '"keep": 0.7, "keep": 0.7'),
            "entries[0].action.keep appears twice in the same object, expected once",
        ),
        (
            edit('"keep": 0.7, ', ""),
            "entries[0].action.keep is missing, expected a number",
        ),
        (
            edit('"trigger": {}', '"trigger": {"every": 4}'),
            'trigger has the unknown field "every", expected decode_every, prefill_chunk, online; '
            "update cacheplan if the file is newer",
        ),
        (
            edit('"trigger": {}', '"triggers": {}'),
            'the file has the unknown field "triggers", expected family, model, recipe, budget, '
            "entries, trigger, certificate, predicted, measured, provenance; "
            "update cacheplan if the file is newer",
        ),
    ],
)
def test_refuses(data: Callable[[], bytes], sentence: str) -> None:
    with pytest.raises(PlanError) as caught:
        loads(data(), "plan.json")
    assert str(caught.value) == f"plan.json: {sentence}"


def test_a_plan_that_contradicts_itself_is_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, budget=replace(PLAN.budget, reached=0.5))
    sentence = "budget.reached is 0.5, expected a number from 0 to the budget 0.4"
    with pytest.raises(PlanError, match=sentence):
        write_plan(plan, tmp_path / "plan.json")
    assert not os.listdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(io, "check", lambda _: None)
        data = dumps(plan)
    with pytest.raises(PlanError, match=f"plan.json: {sentence}"):
        loads(data, "plan.json")


def test_a_truncated_file_is_never_read() -> None:
    for size in [*range(0, len(DATA) - 1, 37), len(DATA) - 2]:
        with pytest.raises(PlanError):
            loads(DATA[:size], "plan.json")


def test_every_edited_character_of_a_number_is_noticed() -> None:
    text = re.sub(r'"(\\.|[^"\\])*"', lambda match: "_" * len(match[0]), DATA.decode())
    places = [i for match in re.finditer(r"-?\d[\d.e+-]*", text) for i in range(*match.span())]
    assert len(places) > 150
    for place in places:
        for new in b"019.eE-":
            if DATA[place] != new:
                with pytest.raises(PlanError):
                    loads(DATA[:place] + bytes([new]) + DATA[place + 1 :], "plan.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_plan(tmp_path / "none.json")
    assert str(caught.value) == (
        f"there is no plan at {tmp_path / 'none.json'}; write one with `cacheplan solve`"
    )
    with pytest.raises(InputError) as caught:
        read_plan(tmp_path)
    assert str(caught.value) == (
        f"cannot read {tmp_path} (Is a directory); give a plan file written by `cacheplan solve`"
    )


def test_a_failed_write_leaves_the_old_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    path = tmp_path / "plan.json"
    write_plan(PLAN, path)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match=r"cannot write .*plan\.json \(Read-only file system\)"):
        write_plan(replace(PLAN, recipe="other"), path)
    assert path.read_bytes() == DATA
    assert os.listdir(tmp_path) == ["plan.json"]


def test_reading_plans_loads_neither_torch_nor_scipy() -> None:
    code = (
        "import sys, cacheplan.plans.io, cacheplan.plans.rows, cacheplan.plans.diff\n"
        "print(sorted({'torch', 'scipy', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
