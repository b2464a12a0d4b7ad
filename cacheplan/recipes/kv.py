"""Published KV-cache methods, each one row: which tokens, how many, when.

The free product of the cells is what `planned` searches; the rows reproduce papers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cacheplan.plans.storage import bare
from cacheplan.recipes.bits import BIT_ROWS, DEMOTIONS, FORMATS
from cacheplan.types import (
    AccumulatedAttention,
    BestScores,
    BlockDistance,
    ExpectedAttention,
    KeyDifference,
    KeyNorm,
    KVAction,
    KVRecipe,
    LagDifference,
    LanguageSpec,
    LowPassResidual,
    Merge,
    OutputError,
    Position,
    Preference,
    ProbeAttention,
    Pyramid,
    Random,
    SpectralResidual,
    WindowAttention,
    needs_prompt,
)

WINDOW = 32  # SnapKV's observation window
_SNAPKV = KVAction(keep=1.0, scorer=WindowAttention(window=WINDOW), recent=WINDOW)
_CAKE = KVAction(keep=1.0, scorer=WindowAttention(window=WINDOW, variance=200.0), recent=WINDOW)

_ROWS = (
    KVRecipe(
        name="uniform",
        summary="the same share everywhere, tokens by mean attention received",
        paper="baseline: H2O's statistic without its bias to old tokens",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=AccumulatedAttention(mean=True), sinks=4),),
    ),
    KVRecipe(
        name="random",
        summary="random tokens: the floor",
        paper="baseline",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=Random()),),
    ),
    KVRecipe(
        name="streaming_llm",
        summary="the first four tokens and a recent window",
        paper="Xiao et al. 2023, arXiv 2309.17453 (original positions instead of compact ones)",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=Position(), sinks=4),),
    ),
    KVRecipe(
        name="knorm",
        summary="keys of small norm",
        paper="Devoto et al. 2024, arXiv 2406.11430",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=KeyNorm()),),
    ),
    KVRecipe(
        name="keydiff",
        summary="keys unlike the mean key",
        paper="Park et al. 2025, arXiv 2504.15364",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=KeyDifference()),),
    ),
    KVRecipe(
        name="h2o",
        summary="half heavy hitters by accumulated attention, half recent, at every step",
        paper="Zhang et al. 2023, arXiv 2306.14048",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=AccumulatedAttention(), recent_share=0.5),),
        decode_every=1,
    ),
    KVRecipe(
        name="snapkv",
        summary="what the last 32 queries attend to, pooled over 5 tokens",
        paper="Li et al. 2024, arXiv 2404.14469",
        allocation="uniform",
        candidates=(_SNAPKV,),
    ),
    KVRecipe(
        name="adakv",
        summary="SnapKV scores, the heads of a layer compete for its tokens",
        paper="Feng et al. 2024, arXiv 2407.11550",
        allocation="uniform",
        candidates=(
            KVAction(
                keep=1.0,
                scorer=WindowAttention(window=WINDOW, pool=7, pooling="max"),
                recent=WINDOW,
                split="adaptive",
                floor=0.2,
            ),
        ),
    ),
    KVRecipe(
        name="prefixkv",
        summary="every layer retains the same share of attention mass",
        paper="Wang et al. 2024, arXiv 2412.03409",
        allocation="prefix",
        candidates=(
            KVAction(keep=1.0, scorer=AccumulatedAttention(), sinks=1, recent=1, share="layer"),
        ),
    ),
    KVRecipe(
        name="tova",
        summary="what the newest query attends to, one set per layer, at every step",
        paper="Oren et al. 2024, arXiv 2401.06104",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=WindowAttention(window=1, pool=1), share="layer"),),
        decode_every=1,
    ),
    KVRecipe(
        name="vatp",
        summary="SnapKV's scores times the L1 norm of the value",
        paper="Guo et al. 2024, arXiv 2406.12335 (SnapKV's window instead of H2O's sums)",
        allocation="uniform",
        candidates=(
            KVAction(
                keep=1.0,
                scorer=WindowAttention(window=WINDOW, value_norm=True),
                sinks=4,
                recent=WINDOW,
            ),
        ),
    ),
    KVRecipe(
        name="expected_attention",
        summary="attention expected from the next 512 queries, times the norm of the value",
        paper="Devoto et al. 2025, arXiv 2510.00636",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=ExpectedAttention(), sinks=4),),
    ),
    KVRecipe(
        name="lagkv",
        summary="keys and values that stand out against the 128 tokens after them",
        paper="Liang et al. 2025, arXiv 2504.04704",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=LagDifference(), sinks=4),),
    ),
    KVRecipe(
        name="pyramidkv",
        summary="SnapKV with a window of 8, layers by a pyramid",
        paper="Cai et al. 2024, arXiv 2406.02069 (steps not rounded, so that the sum is exact)",
        allocation="proportional",
        weight=Pyramid(),
        candidates=(KVAction(keep=1.0, scorer=WindowAttention(window=8), recent=8),),
    ),
    KVRecipe(
        name="cake_static",
        summary="mean and variance over the window, layers by how dispersed and shifting it is",
        paper="Qin et al. 2025, arXiv 2503.12491 (preferences from calibration, not online)",
        allocation="proportional",
        weight=Preference(),
        candidates=(_CAKE,),
    ),
    KVRecipe(
        name="cake",
        summary="mean and variance over the window, layers by what each prompt's attention prefers",
        paper="Qin et al. 2025, arXiv 2503.12491 (both exponents 1; no eviction while decoding)",
        allocation="uniform",
        candidates=(_CAKE,),
        online=Preference(),
    ),
    KVRecipe(
        name="compresskv",
        summary="four retrieval heads choose for their layer, layers by output error",
        paper="Lin et al. 2025, arXiv 2508.02401 (error of all heads' choice, before projection)",
        allocation="proportional",
        weight=OutputError(),
        least=32,
        most=3.0,
        ranking_heads=4,
        candidates=(KVAction(keep=1.0, scorer=WindowAttention(window=8), recent=8, share="layer"),),
    ),
    KVRecipe(
        name="flashcache",
        summary="tokens far from a low-pass filtered course, layers by energy above it",
        paper="Yang et al. 2025, arXiv 2511.16786 (keys with their rotation, each kv head alone)",
        allocation="proportional",
        weight=SpectralResidual(),
        candidates=(KVAction(keep=1.0, scorer=LowPassResidual()),),
    ),
    KVRecipe(
        name="epicache",
        summary="SnapKV block by block, layers by how far keys move when read in blocks",
        paper="Kim et al. 2025, arXiv 2509.17396 (one cache, scored by each block's own end)",
        allocation="proportional",
        weight=BlockDistance(),
        least_share=0.25,
        candidates=(_SNAPKV,),
        prefill_chunk=2048,
    ),
    KVRecipe(
        name="dapq",
        summary="what 32 filler tokens behind the prompt attend to",
        paper="Tian et al. 2026, arXiv 2603.11564 (the prompt's last tokens as filler)",
        allocation="uniform",
        candidates=(KVAction(keep=1.0, scorer=ProbeAttention()),),
    ),
    KVRecipe(
        name="kvzip",
        summary="what the prompt attends to when it is read again, heads of all layers compete",
        paper="Kim et al. 2025, arXiv 2505.23416 (no instruction before the repetition)",
        allocation="uniform",
        candidates=(
            KVAction(
                keep=1.0,
                scorer=ProbeAttention(content="prompt", tokens=2048, reduce="max"),
                sinks=4,
            ),
        ),
        online=BestScores(),
    ),
    KVRecipe(
        name="elastic",
        summary="anchors by accumulated attention, every other token averaged into the nearest",
        paper="Liu et al. 2024, arXiv 2407.18121 (top scores by rank; no slot removed per step)",
        allocation="uniform",
        candidates=(
            KVAction(
                keep=1.0,
                scorer=AccumulatedAttention(),
                sinks=1,
                recent=1,
                share="layer",
                losers="merge",
                merge=Merge(count_bias=False),
            ),
        ),
    ),
    KVRecipe(
        name="kvmerger",
        summary="runs of similar keys merged into their most attended token, which stays counted",
        paper="Wang et al. 2024, arXiv 2407.08454 (a budget instead of a threshold's outcome)",
        allocation="uniform",
        candidates=(
            KVAction(
                keep=1.0,
                scorer=AccumulatedAttention(),
                recent=WINDOW,
                losers="merge",
                merge=Merge(to="similar"),
            ),
        ),
    ),
    KVRecipe(
        name="duoattention",
        summary="retrieval heads keep everything, the others a recent window",
        paper="Xiao et al. 2024, arXiv 2410.10819 (heads by measured damage, not by training)",
        allocation="classes",
        candidates=(KVAction(keep=1.0, scorer=Position(), sinks=4),),
    ),
)

_SHORT_WINDOW = 8  # a planned head may need less protection; whether it does is measured

# every scorer here costs one pass over the keys, at most for a window of queries: the sums over
# all queries (uniform, h2o, prefixkv) cost a second attention and gained the plan nothing.  What a
# low-pass filter leaves out costs less and gains most where little may stay, at both widths;
# expected attention gained nothing beside it, CAKE's variance and a window of 8 nothing at all
_PLANNED = KVRecipe(
    name="planned",
    summary="per head: how much, and chosen how, by measured damage under one budget",
    paper="cacheplan",
    allocation="knapsack",
    candidates=(
        KVAction(keep=1.0, scorer=Position(), sinks=4),
        KVAction(keep=1.0, scorer=Position(), sinks=1),
        KVAction(keep=1.0, scorer=KeyNorm()),
        KVAction(keep=1.0, scorer=KeyDifference()),
        KVAction(keep=1.0, scorer=KeyDifference(), sinks=1, recent=_SHORT_WINDOW),
        _SNAPKV,
        KVAction(
            keep=1.0, scorer=WindowAttention(window=16, pool=1), sinks=1, recent=_SHORT_WINDOW
        ),
        KVAction(keep=1.0, scorer=LowPassResidual()),
        KVAction(keep=1.0, scorer=LowPassResidual(passband=0.02)),
    ),
)

_JOINT = replace(
    _PLANNED,
    name="joint",
    summary="per head: tokens, bits of keys and bits of values at once, by measured damage",
    allocation="joint",
    formats=FORMATS,
    demotions=DEMOTIONS,
)

RECIPES = {row.name: row for row in (_PLANNED, _JOINT, *_ROWS, *BIT_ROWS)}
# precisions are measured apart from the choice of tokens
CANDIDATES = tuple(dict.fromkeys(bare(c) for row in RECIPES.values() for c in row.candidates))


# where prompts show images: text before them, then what the last queries attend to
_BEFORE_IMAGES = tuple(
    replace(candidate, protect_text=True)
    for candidate in _PLANNED.candidates
    if isinstance(candidate.scorer, WindowAttention)
)


def candidates_for(model: LanguageSpec, rows: Iterable[KVRecipe]) -> tuple[KVAction, ...]:
    """Every candidate of these rows, and those that only models with images have."""
    own = tuple(dict.fromkeys(bare(c) for row in rows for c in row.candidates))
    return own if model.image_token is None else (*own, *_BEFORE_IMAGES)


def costly(row: KVRecipe) -> bool:
    """Whether measuring takes passes of its own, as merged tokens and probes do."""
    return any(c.merge is not None or isinstance(c.scorer, ProbeAttention) for c in row.candidates)


def seeing(recipe: KVRecipe, model: LanguageSpec) -> KVRecipe:
    """The recipe with more to choose from, where it searches a menu for a model with images."""
    if model.image_token is None or recipe.name not in (_PLANNED.name, _JOINT.name):
        return recipe
    return replace(recipe, candidates=(*recipe.candidates, *_BEFORE_IMAGES))


def while_decoding(recipe: KVRecipe) -> KVRecipe:
    """The same choice of options without those that cannot rank tokens while decoding."""
    able = tuple(c for c in recipe.candidates if not (needs_prompt(c.scorer) or c.protect_text))
    return replace(recipe, candidates=able) if len(recipe.candidates) > 1 else recipe
