"""Models, plans and prompts shared by the tests; nothing here touches the network."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from cacheplan.types import (
    Budget,
    Certificate,
    Entry,
    KVAction,
    KVPlan,
    LanguageSpec,
    Provenance,
    Site,
    Trigger,
)


def pytest_configure(config: pytest.Config) -> None:
    # numpy's complaint about torch, whenever diffusers' DPM-Solver sets its timesteps
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _module(path: str) -> Any:
    """A module beside the tests, which cannot import each other's files."""
    place = Path(__file__).parent / path
    spec = spec_from_file_location(place.stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_pipelines() -> Any:
    """The module `tests/adapters/tiny_pipelines.py`."""
    return _module("adapters/tiny_pipelines.py")


@pytest.fixture(scope="session")
def synthetic_profiles() -> Any:
    """The module `tests/schedules/synthetic_profiles.py`."""
    return _module("schedules/synthetic_profiles.py")


@pytest.fixture(scope="session")
def tiny_decoders() -> Any:
    """The module `tests/runtime/tiny_decoders.py`."""
    return _module("runtime/tiny_decoders.py")


@pytest.fixture(scope="session")
def tiny_vision() -> Any:
    """The module `tests/runtime/tiny_vision.py`."""
    return _module("runtime/tiny_vision.py")


@pytest.fixture
def lpips_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install packages that stand in for LPIPS; the file of weights that they look for."""
    module = _module("lpips_stand_in.py")
    packages = tmp_path / "packages"
    packages.mkdir()
    module.install(packages)
    file: Path = tmp_path / "torch" / "hub" / "checkpoints" / module.WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.syspath_prepend(packages)
    for name in _loaded("lpips", "torchvision"):
        monkeypatch.delitem(sys.modules, name)
    yield file
    for name in _loaded("lpips", "torchvision"):
        del sys.modules[name]


def _loaded(*packages: str) -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in packages]


TinyPipeline = Callable[[str], tuple[Any, dict[str, Any]]]


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_pipelines: Any) -> TinyPipeline:
    """Build a random diffusion pipeline by name: `pipe, call = tiny_pipeline("pixart")`."""
    build: TinyPipeline = tiny_pipelines.build
    return build


@pytest.fixture(scope="session")
def tiny_shapes(tiny_pipelines: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random three-block pipeline with prompts in words and pictures of 64 pixels.

    Its `settings.json`, `calibration.txt` and `heldout.jsonl` lie beside the folder.
    """
    from cacheplan.zoo.shapes import train

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    sizes = {"WIDTH": 32, "HEADS": 2, "BLOCKS": 3}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, value in sizes.items():
            patch.setattr(train, name, value)
        denoiser = tiny_pipelines.random_weights(train.transformer())
        pipe = train.pipeline(train.autoencoder().eval(), denoiser, train.text_encoder().eval())
        pipe.save_pretrained(folder)
    settings = {"num_inference_steps": 8, "guidance_scale": 2.0, "max_sequence_length": 12}
    settings |= {"use_resolution_binning": False, "clean_caption": False}
    (folder.parent / "settings.json").write_text(json.dumps(settings))
    (folder.parent / "calibration.txt").write_text("one red star\ntwo rings on grey\n")
    lines = [{"prompt": "three crosses", "seed": 5}, {"prompt": "a blue square on black"}]
    (folder.parent / "heldout.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random three-layer Llama with grouped queries (4 query heads on 2 kv heads)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,  # attention far from uniform, so that evictions differ
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_spec(tiny_llama: Any) -> LanguageSpec:
    from cacheplan.adapters.language import describe

    return describe(tiny_llama, "tiny")


MakePlan = Callable[..., KVPlan]


@pytest.fixture(scope="session")
def make_plan(tiny_spec: LanguageSpec) -> MakePlan:
    """Build a plan for the tiny model from one action per layer, or per (layer, head)."""

    def build(
        actions: dict[int | tuple[int, int], KVAction] | KVAction,
        *,
        decode_every: int | None = None,
        max_rows: int | None = None,
        spec: LanguageSpec = tiny_spec,
    ) -> KVPlan:
        if isinstance(actions, KVAction):
            actions = dict.fromkeys(spec.planned, actions)
        entries = tuple(
            Entry(
                site=Site(layer=at) if isinstance(at, int) else Site(layer=at[0], head=at[1]),
                action=action,
            )
            for at, action in actions.items()
        )
        weights = [spec.kv_heads if e.site.head is None else 1 for e in entries]
        keeps = [e.action.keep for e in entries if isinstance(e.action, KVAction)]
        kept = sum(w * k for w, k in zip(weights, keeps, strict=True)) / sum(weights)
        return KVPlan(
            model=spec,
            recipe="test",
            budget=Budget(asked=str(kept), kept=kept, reached=kept, length=100, max_rows=max_rows),
            entries=entries,
            trigger=Trigger(decode_every=decode_every),
            certificate=Certificate(solver="none", value=0.0, bound=None, gap=None, status="Test."),
            predicted=None,
            measured=None,
            provenance=Provenance(
                profile=None, prompts=None, seed=0, versions=(("cacheplan", "0"),), command=""
            ),
        )

    return build
