"""A model divided between memory and disk: the same digest, profile, plan and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheplan import api
from cacheplan.adapters.digest import digest
from cacheplan.adapters.language import describe, load
from cacheplan.adapters.offloading import Weights, input_device
from cacheplan.cli.options import placement_of
from cacheplan.errors import InputError

TEXT = " ".join(f"w{i * i % 59}" for i in range(40))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer Llama with a tokenizer of sixty words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(59)} | {"<unk>": 59}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        tie_word_embeddings=request.param,
    )
    path = tmp_path_factory.mktemp("model") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    device_map = {
        "model.embed_tokens": "disk",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    (path.parent / "map.json").write_text(json.dumps(device_map))
    (path.parent / "texts.txt").write_text(f"{TEXT}\n\n{TEXT[::-1]}\n")
    (path.parent / "heldout.txt").write_text(f"{TEXT[5:]}\n")
    return path


@pytest.fixture(scope="module")
def divided(folder: Path) -> api.Placement:
    found = placement_of(str(folder.parent / "map.json"), None, None)
    assert found is not None
    return found


def test_offloaded_weights_are_seen_one_at_a_time(folder: Path, divided: api.Placement) -> None:
    plain, placed = load(str(folder)), load(str(folder), placement=divided)
    far = {name for name, tensor in placed.model.state_dict().items() if tensor.is_meta}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"} < far
    weights = Weights(placed.model)
    assert weights.keys() == plain.model.state_dict().keys()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert {n for n, tensor in placed.model.state_dict().items() if tensor.is_meta} == far
    assert input_device(placed.model) == input_device(plain.model) == torch.device("cpu")
    assert placed.spec == plain.spec == describe(placed.model, plain.spec.id)


def test_any_offloaded_model_has_its_digest() -> None:
    from accelerate import cpu_offload

    def model() -> torch.nn.Module:
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))

    offloaded: torch.nn.Module = cpu_offload(model(), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert digest([({}, Weights(offloaded))]) == digest([({}, model().state_dict())])


def test_profile_plan_and_text_are_the_same(
    folder: Path, divided: api.Placement, tmp_path: Path
) -> None:
    texts, heldout = folder.parent / "texts.txt", folder.parent / "heldout.txt"
    outs = [tmp_path / "plain.safetensors", tmp_path / "divided.safetensors"]
    found: list[Any] = []
    for out, placement in zip(outs, (None, divided), strict=True):
        profile = api.profile(
            str(folder), prompts=texts, ablate=1, out=out, split=0.6, placement=placement
        )
        assert profile is not None
        plan: Any = api.solve(profile, budget=0.5)
        verified = api.verify(plan, prompts=heldout, split=0.6, placement=placement)
        generated = api.generate(plan, prompt=TEXT, max_new_tokens=12, placement=placement)
        found.append((plan, verified, generated.text, generated.measured_bytes))
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert found[0] == found[1]
    assert found[0][2]


@pytest.mark.parametrize(
    ("device_map", "max_memory", "sentence"),
    [
        ("missing.json", None, "cannot be read"),
        ("list.json", None, "no object of devices by module"),
        (None, "10GiB", "a GPU's number or cpu, and a size"),
        (None, "0=10GiB,cpu=4", "no unit of bytes"),
    ],
)
def test_what_cannot_be_placed(
    tmp_path: Path, device_map: str | None, max_memory: str | None, sentence: str
) -> None:
    (tmp_path / "list.json").write_text("[0, 1]")
    with pytest.raises(InputError, match=sentence):
        placement_of(device_map and str(tmp_path / device_map), max_memory, None)


def test_options_become_a_placement(tmp_path: Path) -> None:
    assert placement_of(None, None, None) is None
    assert placement_of(None, "0=10GiB, cpu=4MB", tmp_path) == api.Placement(
        "auto", {0: 10 * 2**30, "cpu": 4 * 10**6}, tmp_path
    )


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.safetensors"
    with pytest.raises(InputError, match="leave out one"):
        load(str(folder), device="cpu", placement=api.Placement())
    with pytest.raises(InputError, match="leave out torchrun"):
        api.profile(out=out, placement=api.Placement(), processes=api.Processes(0, 2))
    with pytest.raises(InputError, match="--device-map is for language models"):
        api.profile(out=out, family="diffusion", placement=api.Placement())
    with pytest.raises(InputError, match="could not be loaded"):
        load(str(folder), placement=api.Placement("nowhere"))
    monkeypatch.setattr("cacheplan.adapters.offloading.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package accelerate"):
        load(str(folder), placement=api.Placement())
