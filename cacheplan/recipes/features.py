"""Published feature caches of diffusion models, each one row: what is kept, when, and how repaired.

Every row is given a budget instead of the paper's knob (an interval, a threshold): the knob that
spends the budget is found, so that methods compare at equal computation.
"""

from __future__ import annotations

from cacheplan.types import FeatureRecipe, Gate

_ROWS = (
    FeatureRecipe(
        name="planned",
        summary="computed steps, bases and partial steps by measured damage to the final latent",
        paper="cacheplan",
        sites="whole",
        schedule="planned",
    ),
    FeatureRecipe(
        name="uniform",
        summary="evenly spread steps, the last hidden state reused between them",
        paper="baseline",
        sites="whole",
        schedule="interval",
    ),
    FeatureRecipe(
        name="fora",
        summary="attention and mlp outputs reused at even intervals",
        paper="Selvaraju et al. 2024, arXiv 2407.01425",
        sites="parts",
        schedule="interval",
    ),
    FeatureRecipe(
        name="taylorseer",
        summary="attention and mlp outputs forecast by a Taylor series at even intervals",
        paper="Liu et al. 2025, arXiv 2503.06923",
        sites="parts",
        schedule="interval",
        basis="taylor",
        order=1,
        warmup=3,
    ),
    FeatureRecipe(
        name="smoothcache",
        summary="one schedule per kind of layer: skip as far as the mean change allows",
        paper="Liu et al. 2024, arXiv 2411.10510",
        sites="parts",
        share="type",
        schedule="lookahead",
        cost="l1",
        protect_last=True,
    ),
    FeatureRecipe(
        name="cachequant",
        summary="dynamic programming over drift, then a least squares fit of every channel",
        paper="Liu et al. 2025, arXiv 2503.01323 (schedule and cache correction, full precision)",
        sites="whole",
        schedule="path",
        cost="l1",
        segment=(0.5, 2.0),
        correction="channel",
    ),
    FeatureRecipe(
        name="bac",
        summary="each attention and mlp its own steps by similarity, united where errors surge",
        paper="Ji et al. 2025, arXiv 2506.13456",
        sites="parts",
        share="site",
        schedule="path",
        cost="cosine",
        donors=3,
    ),
    FeatureRecipe(
        name="dpcache",
        summary="key steps by path cost of the forecast, one predecessor per key",
        paper="arXiv 2602.22654 (mean square instead of absolute errors)",
        sites="whole",
        schedule="recurrence",
        basis="taylor",
        order=1,
        warmup=3,
    ),
    FeatureRecipe(
        name="magcache",
        summary="skip while the residual's norm has hardly changed, as a fixed mask",
        paper="Ma et al. 2025, arXiv 2506.09045",
        sites="stack",
        schedule="magnitude",
    ),
    FeatureRecipe(
        name="ertacache",
        summary="threshold on the model's residual, and a scalar correction",
        paper="Peng et al. 2025, arXiv 2508.21091 (without its shortened steps)",
        sites="model",
        schedule="threshold",
        cost="l1",
        correction="scalar",
        protect_last=True,
    ),
    FeatureRecipe(
        name="scm",
        summary="cache-dit's hand-written bins of computed steps, all blocks but the first reused",
        paper="cache-dit, steps computation mask",
        sites="tail",
        schedule="mask",
    ),
    FeatureRecipe(
        name="fbcache",
        summary="online: skip while the first block's residual has hardly changed",
        paper="ParaAttention, First Block Cache",
        sites="tail",
        schedule="gate",
        gate=Gate(signal="first_block", threshold=0.0),
    ),
    FeatureRecipe(
        name="dbcache",
        summary="online: the first blocks probe, at most three skips in a row after a warm-up",
        paper="cache-dit, Dual Block Cache (blocks in proportion to the model's depth)",
        sites="tail",
        schedule="gate",
        warmup=4,
        head=8,
        gate=Gate(signal="first_block", threshold=0.0, blocks=8, warmup=4, max_consecutive=3),
    ),
    FeatureRecipe(
        name="easycache",
        summary="online: skip while the output is expected to have changed little",
        paper="Zhou et al. 2025, arXiv 2507.02860",
        sites="model",
        schedule="gate",
        warmup=5,
        protect_last=True,
        gate=Gate(signal="secant", threshold=0.0, accumulate="sum", warmup=5, protect_last=1),
    ),
)

FEATURE_RECIPES = {row.name: row for row in _ROWS}
