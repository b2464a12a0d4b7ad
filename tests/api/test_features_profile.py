"""Profiles of a tiny diffusion pipeline: interrupted, divided, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cacheplan import api
from cacheplan.errors import InputError, ProfileError, UnsupportedError
from cacheplan.profilers import feature_collect
from cacheplan.profilers.store import read_state
from cacheplan.types import FeatureProfile


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder.parent / "settings.json").read_text()), **changes}


def measure(folder: Path, out: Path, **options: Any) -> Any:
    given = {"settings": settings(folder), "prompts": folder.parent / "calibration.txt"}
    return api.profile(str(folder), out=out, **{"ablate": 1, **given, **options})


@pytest.fixture(scope="module")
def whole(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "profile.safetensors"
    measure(tiny_shapes, out)
    return out


def test_a_folder_tells_its_family_and_the_profile_its_model(
    whole: Path, tiny_shapes: Path
) -> None:
    found = api.load_profile(whole)
    assert isinstance(found, FeatureProfile)
    assert found.model.id == str(tiny_shapes)
    assert (found.model.steps, found.lags, found.prompts) == (8, 7, 2)
    assert json.loads(found.model.call)["num_inference_steps"] == 8
    assert found.statistics["gram"].count == 2
    assert found.statistics["final_error"].count == 1
    assert (found.statistics["final_error"].mean[:, 1:] > 0).all()
    assert "diffusers" in dict(found.versions)


def test_interrupted_and_started_again_gives_the_same_bytes(
    whole: Path, tiny_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "profile.safetensors"
    part = tmp_path / "profile.safetensors.part"

    def interrupted(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny_shapes, out, progress=interrupted)
    assert read_state(part).done == {0}
    assert not out.exists()
    ablate = feature_collect._ablate
    monkeypatch.setattr(feature_collect, "_ablate", None)  # was done on the first prompt
    measure(tiny_shapes, out)
    monkeypatch.setattr(feature_collect, "_ablate", ablate)
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_two_shards_merge_to_the_same_bytes(whole: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "a", tmp_path / "b"]
    for i, shard in enumerate(shards):
        assert measure(tiny_shapes, shard, shard=(i, 2)) is None
    with pytest.raises(ProfileError, match="lacks 1 of 2 prompts"):
        api.load_profile(shards[1])
    api.merge(shards, out=tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == whole.read_bytes()


def test_other_settings_do_not_resume(whole: Path, tiny_shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "p.part").write_bytes(whole.read_bytes())
    with pytest.raises(InputError, match="other settings"):
        measure(tiny_shapes, tmp_path / "p", settings=settings(tiny_shapes, guidance_scale=3.0))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"settings": {"num_inference_steps": 3}}, UnsupportedError, "takes 3 steps"),
        ({"settings": {"num_steps": 9}}, InputError, "no setting num_steps"),
        ({"settings": {"output_type": 1}}, InputError, "no setting output_type"),
        ({"lags": 8}, InputError, "--lags is 8, but in a run of 8 steps"),
        ({"lags": 0}, InputError, "--lags is 0, expected at least 1"),
        ({"tokens": 0}, InputError, "--tokens is 0, expected at least 1"),
        ({"ablate": 0}, InputError, "--ablate is 0"),
        ({"shard": (2, 2)}, InputError, "expected i/n"),
        ({"split": 0.5}, InputError, "--split is for language models"),
        ({"limit": 0}, InputError, "expected at least 1"),
        ({"prompts": None}, InputError, "brings no calibration prompts"),
        ({"family": "vision"}, InputError, "expected language or diffusion"),
        ({"out": Path("no/such/folder/p")}, InputError, "cannot write"),
    ],
)
def test_bad_options(
    tiny_shapes: Path, tmp_path: Path, options: Any, error: type[Exception], sentence: str
) -> None:
    extra = options.get("settings")
    if extra is not None:
        options = {**options, "settings": settings(tiny_shapes, **extra)}
    with pytest.raises(error) as caught:
        measure(tiny_shapes, **{"out": tmp_path / "p", **options})
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"\n\n", "holds no prompts"),
        ("latin.txt", b"a\xe9", "not UTF-8 text"),
        ("broken.jsonl", b'{"prompt": ', "line 1 is not JSON"),
        ("bare.jsonl", b'{"seed": 3}', "is no prompt"),
        ("seed.jsonl", b'{"prompt": "a", "seed": -1}', "has the seed -1"),
        ("other.jsonl", b'{"promt": "a"}', "takes no promt"),
        ("steps.jsonl", b'{"prompt": "a", "num_inference_steps": 9}', "must be alike for all"),
        ("size.jsonl", b'{"prompt": "a", "height": 32}', "sets height"),
    ],
)
def test_bad_prompt_files(
    tiny_shapes: Path, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        measure(tiny_shapes, tmp_path / "p", prompts=path)
    assert sentence in str(caught.value)


def test_options_of_diffusion_are_refused_for_language(tmp_path: Path) -> None:
    for options in ({"settings": {"height": 8}}, {"lags": 3}, {"tokens": 9}):
        with pytest.raises(InputError, match="is for diffusion models"):
            api.profile(out=tmp_path / "p", **options)


def test_family_of_models() -> None:
    assert api.family_of(None) == api.family_of("recall") == api.family_of("some/id") == "language"
    assert api.family_of("shapes") == api.family_of("some/id", "diffusion") == "diffusion"
