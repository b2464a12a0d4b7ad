"""Train the embedded recall model and write it as an ordinary `transformers` folder.

    python -m cacheplan.zoo.recall.train OUT [--seed 0]

The curriculum starts with copied segments, from which induction heads grow, then one relation
per name, then all relations, then long documents.  A drill ends as soon as it is mastered.  The
whole reads 14 million words, about half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacheplan.zoo.recall.grammar import BOS, PAD, UNK, VOCABULARY, Mixture, document

IDS = {word: i for i, word in enumerate(VOCABULARY)}


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


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=None,
    )


def tokenizer() -> Any:
    """A fast word-level tokenizer over the grammar's vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(IDS, unk_token=UNK))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, bos_token=BOS, unk_token=UNK, padding_side="left"
    )


def batch(rng: random.Random, stage: Stage) -> tuple[Tensor, Tensor]:
    """Draw token ids and answer flags, both of shape `[B, T]`."""
    drawn = [
        document(rng, stage.length, stage.mixture) for _ in range(BATCH_TOKENS // stage.length)
    ]
    ids = torch.tensor([[IDS[w] for w in words] for words, _ in drawn])
    return ids, torch.tensor([flags for _, flags in drawn])


def train(seed: int) -> Any:
    """Run the curriculum; returns the trained model in float32."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(config())
    forward: Any = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    seen, started, step = 0, time.time(), 0
    cooldown, cooled = sum(stage.tokens for stage in CURRICULUM[-COOLDOWN:]), 0.0
    for number, stage in enumerate(CURRICULUM):
        read, right = 0, 0.0
        while read < stage.tokens and right < stage.mastered:
            rate = PEAK_RATE * min(1.0, seen / WARMUP_TOKENS) * (1 - cooled / cooldown)
            for group in optimizer.param_groups:
                group["lr"] = rate + FINAL_RATE
            ids, answers = batch(rng, stage)
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
            seen, read, step = seen + ids.numel(), read + ids.numel(), step + 1
            if number >= len(CURRICULUM) - COOLDOWN:
                cooled += ids.numel()
            recall = (logits.argmax(-1) == target)[asked].float().mean().item()
            right += 0.02 * (recall - right)
            if step % 50 == 0:
                print(
                    f"stage {number} step {step} tokens {seen / 1e6:.1f}M "
                    f"({seen / (time.time() - started):.0f}/s) "
                    f"loss {loss.mean().item():.3f} answers {right:.3f}",
                    flush=True,
                )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = train(arguments.seed)
    model.save_pretrained(arguments.out)
    tokenizer().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
