"""Train the embedded recall model and write it as an ordinary `transformers` folder.

    python -m cacheplan.zoo.recall.train OUT [--seed 0]
    python -m cacheplan.zoo.recall.train OUT --seed 7 --shape qwen3 --invented-words 7 --last 1.5e6

The curriculum starts with copied segments, from which induction heads grow, then one relation
per name, then all relations, then long documents.  A drill ends as soon as it is mastered.  The
whole reads 14 million words, about half an hour on two CPU cores.

An interrupted training goes on from `OUT/training.pt` when the same command is given again, and
ends in the same weights; the file is gone at the end.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacheplan.errors import CacheplanError
from cacheplan.zoo.recall.checkpoint import Checkpoint
from cacheplan.zoo.recall.grammar import (
    BOS,
    PAD,
    UNK,
    WORDS,
    Mixture,
    Words,
    document,
    invented_words,
)


@dataclass(frozen=True)
class Stage:
    """Documents of `length` words, until the share `mastered` is answered or `tokens` are read."""

    tokens: float
    length: int
    mixture: Mixture
    mastered: float = 2.0  # never: read all tokens


CURRICULUM = (
    Stage(12e6, 128, Mixture(names=4, relations=1, fact=0.3, question=0.5, copied=0.8), 0.85),
    Stage(6e6, 128, Mixture(names=8, relations=1, fact=0.3, question=0.5, copied=0.3), 0.95),
    Stage(6e6, 128, Mixture(names=6, relations=3, fact=0.3, question=0.5, copied=0.1), 0.95),
    Stage(8e6, 256, Mixture(names=12, relations=6, fact=0.3, question=0.4, copied=0.1), 0.97),
    Stage(4e6, 512, Mixture(names=24, relations=6, fact=0.25, question=0.35, copied=0.05)),
    Stage(4e6, 1024, Mixture(names=32, relations=6, fact=0.2, question=0.3, copied=0.03)),
)
COOLDOWN = 2  # the learning rate falls linearly over so many last stages
BATCH_TOKENS = 4096
PEAK_RATE, FINAL_RATE, WARMUP_TOKENS = 2e-3, 2e-5, 4e5
ANSWER_WEIGHT, OTHER_WEIGHT = 1.6, 0.2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What kind of decoder is trained, and how large it is."""

    kind: str
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llama": Shape(kind="llama", layers=6, width=192, mlp=384, heads=6, kv_heads=3, head_dim=32),
    "qwen3": Shape(kind="qwen3", layers=4, width=160, mlp=320, heads=4, kv_heads=2, head_dim=40),
}


def shortened(curriculum: Sequence[Stage], tokens: float) -> list[Stage]:
    """The curriculum with `tokens` in each of its last, long stages."""
    last = [replace(stage, tokens=tokens) for stage in curriculum[-COOLDOWN:]]
    return [*curriculum[:-COOLDOWN], *last]


def numbers(language: Words) -> dict[str, int]:
    """The token id of every word."""
    return {word: i for i, word in enumerate(language.vocabulary)}


def config(shape: Shape, language: Words) -> Any:
    from transformers import AutoConfig

    ids = numbers(language)
    return AutoConfig.for_model(
        shape.kind,
        vocab_size=len(ids),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=None,
    )


def tokenizer(language: Words) -> Any:
    """A fast word-level tokenizer over the grammar's vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = numbers(language)
    words = Tokenizer(WordLevel(ids, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, unk_token=UNK, padding_side="left"
    )


def batch(rng: random.Random, stage: Stage, language: Words) -> tuple[Tensor, Tensor]:
    """Draw token ids and answer flags, both of shape `[B, T]`."""
    ids = numbers(language)
    drawn = [
        document(rng, stage.length, stage.mixture, language)
        for _ in range(BATCH_TOKENS // stage.length)
    ]
    tokens = torch.tensor([[ids[w] for w in words] for words, _ in drawn])
    return tokens, torch.tensor([flags for _, flags in drawn])


@dataclass
class Progress:
    """Where a training is: `read` tokens of a stage, `right` the share of answers of late."""

    stage: int = 0
    read: int = 0
    right: float = 0.0
    seen: int = 0  # tokens of all stages
    cooled: int = 0  # and of the last ones
    step: int = 0


def train(
    seed: int,
    shape: Shape,
    language: Words,
    curriculum: Sequence[Stage] = CURRICULUM,
    checkpoint: Checkpoint | None = None,
) -> Any:
    """Run the curriculum, or what is left of it; returns the trained model in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = AutoModelForCausalLM.from_config(config(shape, language))
    forward: Any = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    at = Progress()
    if checkpoint is not None and (saved := checkpoint.read()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rng.setstate(saved["random"])
        torch.set_rng_state(saved["torch_random"])
        at = Progress(**saved["progress"])
        print(f"goes on from {checkpoint.path}, step {at.step}", flush=True)

    def state() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": rng.getstate(),
            "torch_random": torch.get_rng_state(),
            "progress": asdict(at),
        }

    before, started = at.seen, time.monotonic()
    cooldown = sum(stage.tokens for stage in curriculum[-COOLDOWN:])
    while at.stage < len(curriculum):
        stage = curriculum[at.stage]
        learning = at.read < stage.tokens and at.right < stage.mastered
        if not learning:
            at.stage, at.read, at.right = at.stage + 1, 0, 0.0
            continue
        rate = PEAK_RATE * min(1.0, at.seen / WARMUP_TOKENS) * (1 - at.cooled / cooldown)
        for group in optimizer.param_groups:
            group["lr"] = rate + FINAL_RATE
        ids, answers = batch(rng, stage, language)
        logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
        target, asked = ids[:, 1:], answers[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none"
        ).view_as(target)
        weight = OTHER_WEIGHT + ANSWER_WEIGHT * asked
        optimizer.zero_grad()
        torch.autograd.backward((loss * weight).sum() / weight.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at.seen, at.read, at.step = at.seen + ids.numel(), at.read + ids.numel(), at.step + 1
        if at.stage >= len(curriculum) - COOLDOWN:
            at.cooled += ids.numel()
        recall = (logits.argmax(-1) == target)[asked].float().mean().item()
        at.right += 0.02 * (recall - at.right)
        if at.step % 50 == 0:
            pace = (at.seen - before) / (time.monotonic() - started)
            print(
                f"stage {at.stage} step {at.step} tokens {at.seen / 1e6:.1f}M ({pace:.0f}/s) "
                f"loss {loss.mean().item():.3f} answers {at.right:.3f}",
                flush=True,
            )
        if checkpoint is not None:
            checkpoint.write(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--invented-words", type=int, metavar="SEED")
    parser.add_argument("--last", type=float, default=4e6, help="words in each of the last stages")
    arguments = parser.parse_args()
    made_up = arguments.invented_words
    language = WORDS if made_up is None else invented_words(made_up)
    curriculum = shortened(CURRICULUM, arguments.last)
    shape = SHAPES[arguments.shape]
    identity = repr((arguments.seed, shape, language, curriculum))
    checkpoint = Checkpoint(arguments.out / "training.pt", identity)
    try:
        model = train(arguments.seed, shape, language, curriculum, checkpoint)
    except CacheplanError as error:
        parser.exit(error.exit_code, f"Error: {error}\n")
    model.save_pretrained(arguments.out)
    tokenizer(language).save_pretrained(arguments.out)
    checkpoint.remove()


if __name__ == "__main__":
    main()
