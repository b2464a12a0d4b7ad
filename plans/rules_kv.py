"""What each part of a KV plan may say on its own; `check_kv` holds the rules across parts."""

from __future__ import annotations

from itertools import pairwise

from cacheplan.plans.rules import COUNT, NATURAL, POSITIVE, SHARE, need, one_of
from cacheplan.plans.rules_storage import check_precision, check_tiers
from cacheplan.types import (
    Damage,
    Entry,
    ExpectedAttention,
    KVAction,
    LagDifference,
    LanguageSpec,
    LowPassResidual,
    ProbeAttention,
    Site,
    WeightAction,
    WindowAttention,
)

TARGETS = {"kv": KVAction, "weight": WeightAction}


def check_geometry(model: LanguageSpec) -> None:
    need(bool(model.layer_kinds), "model.layer_kinds", model.layer_kinds, "at least one layer")
    for name in ("query_heads", "kv_heads", "key_width", "value_width", "max_length"):
        value = getattr(model, name)
        need(value >= 1, f"model.{name}", value, COUNT)
    image = model.image_token
    need(image is None or image >= 0, "model.image_token", image, NATURAL)


def check_damage(damage: Damage, path: str) -> None:
    for name in ("kl", "nll", "full_nll"):
        value = getattr(damage, name)
        need(value is None or value >= 0, f"{path}.{name}", value, POSITIVE)
    for name in ("agreement", "recall", "full_recall"):
        value = getattr(damage, name)
        need(value is None or 0 <= value <= 1, f"{path}.{name}", value, SHARE)
    need(damage.prompts >= 0, f"{path}.prompts", damage.prompts, NATURAL)


def check_entry(entry: Entry, model: LanguageSpec, path: str) -> None:
    """PlanError if the entry contradicts itself or lies outside the model."""
    _check_site(entry.site, model, f"{path}.site")
    action, at = entry.action, f"{path}.action"
    need(
        isinstance(action, TARGETS[entry.site.target]),
        f"{path}.site.target",
        entry.site.target,
        "the kind of its action",
    )
    if isinstance(action, KVAction):
        _check_kv(action, entry.site, model, at)
    else:
        check_precision(action.weight, f"{at}.weight")
        check_precision(action.activation, f"{at}.activation")


def _check_site(site: Site, model: LanguageSpec, path: str) -> None:
    one_of(tuple(TARGETS), f"{path}.target", site.target)
    for name, value, end in (
        ("layer", site.layer, model.layers),
        ("head", site.head, model.kv_heads),
    ):
        if value is not None:
            inside = 0 <= value < end
            need(inside, f"{path}.{name}", value, f"an integer from 0 below {end}")


def _check_kv(action: KVAction, site: Site, model: LanguageSpec, path: str) -> None:
    need(0 < action.keep <= 1, f"{path}.keep", action.keep, "a number above 0 and at most 1")
    need(action.sinks >= 0, f"{path}.sinks", action.sinks, NATURAL)
    need(action.recent >= 0, f"{path}.recent", action.recent, NATURAL)
    need(0 <= action.recent_share <= 1, f"{path}.recent_share", action.recent_share, SHARE)
    need(0 <= action.floor <= 1, f"{path}.floor", action.floor, SHARE)
    need(
        not action.protect_text or model.image_token is not None,
        f"{path}.protect_text",
        action.protect_text,
        "false where model.image_token is not given",
    )
    one_of(("head", "layer"), f"{path}.share", action.share)
    one_of(("equal", "adaptive"), f"{path}.split", action.split)
    one_of(("evict", "merge", "demote", "offload"), f"{path}.losers", action.losers)
    _check_merge(action, path)
    if site.head is not None:
        need(
            action.share == "head", f"{path}.share", action.share, '"head" in an entry for one head'
        )
        need(
            action.split == "equal",
            f"{path}.split",
            action.split,
            '"equal" in an entry for one head',
        )
    if action.split == "adaptive":
        need(
            action.share == "head", f"{path}.share", action.share, '"head" where split is adaptive'
        )
    _check_scorer(action, model, f"{path}.scorer")
    check_tiers(action, path)
    need(action.rank is None or action.rank >= 1, f"{path}.rank", action.rank, COUNT)


def _check_merge(action: KVAction, path: str) -> None:
    merge = action.merge
    given = merge is not None
    need(
        given == (action.losers == "merge"),
        f"{path}.merge",
        "given" if given else None,
        f'{"none" if given else "an object"} where losers is "{action.losers}"',
    )
    if merge is not None:
        one_of(("nearest", "similar"), f"{path}.merge.to", merge.to)
        one_of(("distance", "weights"), f"{path}.merge.sigma", merge.sigma)
        cosine = -1 <= merge.similarity <= 1
        need(cosine, f"{path}.merge.similarity", merge.similarity, "a number from -1 to 1")


def _check_scorer(action: KVAction, model: LanguageSpec, path: str) -> None:
    match action.scorer:
        case WindowAttention() as scorer:
            need(scorer.window >= 1, f"{path}.window", scorer.window, COUNT)
            odd = scorer.pool >= 1 and scorer.pool % 2 == 1
            need(odd, f"{path}.pool", scorer.pool, "an odd integer of at least 1")
            one_of(("average", "max"), f"{path}.pooling", scorer.pooling)
            need(scorer.variance >= 0, f"{path}.variance", scorer.variance, POSITIVE)
            if scorer.heads:
                _check_ranking_heads(action, scorer.heads, model, path)
        case ExpectedAttention() as scorer:
            need(scorer.future >= 1, f"{path}.future", scorer.future, COUNT)
            need(scorer.skipped >= 0, f"{path}.skipped", scorer.skipped, NATURAL)
            need(scorer.epsilon >= 0, f"{path}.epsilon", scorer.epsilon, POSITIVE)
        case LagDifference() as scorer:
            need(scorer.lag >= 1, f"{path}.lag", scorer.lag, COUNT)
            need(scorer.skipped >= 0, f"{path}.skipped", scorer.skipped, NATURAL)
        case LowPassResidual() as scorer:
            need(0 <= scorer.passband <= 1, f"{path}.passband", scorer.passband, SHARE)
        case ProbeAttention() as scorer:
            _check_probe(scorer, path)


def _check_probe(scorer: ProbeAttention, path: str) -> None:
    one_of(("filler", "prompt"), f"{path}.content", scorer.content)
    one_of(("sum", "max"), f"{path}.reduce", scorer.reduce)
    need(scorer.tokens >= 1, f"{path}.tokens", scorer.tokens, COUNT)
    odd = scorer.pool >= 1 and scorer.pool % 2 == 1
    need(odd, f"{path}.pool", scorer.pool, "an odd integer of at least 1")
    need(all(i >= 0 for i in scorer.ids), f"{path}.ids", scorer.ids, "token ids of at least 0")
    fits = scorer.content == "prompt" or len(scorer.ids) in (0, scorer.tokens)
    need(fits, f"{path}.tokens", scorer.tokens, f"the number of ids, {len(scorer.ids)}")


def _check_ranking_heads(
    action: KVAction, heads: tuple[int, ...], model: LanguageSpec, path: str
) -> None:
    ascending = all(before < after for before, after in pairwise(heads))
    inside = heads[0] >= 0 and heads[-1] < model.query_heads
    expected = f"ascending query heads from 0 below {model.query_heads}"
    need(ascending and inside, f"{path}.heads", heads, expected)
    need(
        action.share == "layer",
        f"{path}.heads",
        heads,
        'none unless action.share is "layer": they rank the tokens of all kv heads',
    )
