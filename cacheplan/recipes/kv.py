"""Published KV-cache methods, each one row: which tokens, how many, when.

The free product of the cells is what `planned` searches; the rows reproduce papers.
"""

from __future__ import annotations

from dataclasses import replace

from cacheplan.types import (
    AccumulatedAttention,
    KeyDifference,
    KeyNorm,
    KVAction,
    KVRecipe,
    Position,
    Random,
    WindowAttention,
)

WINDOW = 32  # SnapKV's observation window

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
        candidates=(KVAction(keep=1.0, scorer=WindowAttention(window=WINDOW), recent=WINDOW),),
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
)

_SHORT_WINDOW = 8  # a planned head may need less protection; whether it does is measured

# every scorer here costs one pass over the keys, at most for a window of queries: the sums over
# all queries (uniform, h2o, prefixkv) cost a second attention and gained the plan nothing
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
        KVAction(keep=1.0, scorer=WindowAttention(window=WINDOW), recent=WINDOW),
        KVAction(
            keep=1.0, scorer=WindowAttention(window=16, pool=1), sinks=1, recent=_SHORT_WINDOW
        ),
    ),
)

RECIPES = {row.name: row for row in (_PLANNED, *_ROWS)}
CANDIDATES = tuple(dict.fromkeys(c for row in RECIPES.values() for c in row.candidates))


def while_decoding(recipe: KVRecipe) -> KVRecipe:
    """The same choice of options without those that cannot rank tokens while decoding."""
    able = tuple(c for c in recipe.candidates if not isinstance(c.scorer, WindowAttention))
    return replace(recipe, candidates=able) if len(recipe.candidates) > 1 else recipe
