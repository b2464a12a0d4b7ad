"""Damage of few bits to one layer's attention output: of every precision, and of demoted tokens.

Measured on the embedded model: errors of keys and values add up (2 bits each: 27.8 of 10.9 and
16.4), and so do those of precision and eviction, within 0.87 and 1.14 of the sum (`joint_damage`);
their effect does not: a unit of damage by keys of 2 bits moves the logits up to ten times as far as
one by values.  So keys and values are measured, and weighed by ablation, each on their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cacheplan.adapters.attention import Step
from cacheplan.adapters.packing import packing
from cacheplan.kernels.quantize.naive import dequantize, quantize
from cacheplan.plans.storage import bare, divide
from cacheplan.profilers.damage import Nested, capped, kept_counts
from cacheplan.types import KVAction, Precision, Tier

_PLAIN = Precision()
_ASKED = 0.5  # share of the continuation's queries that are asked
_GOLDEN = (
    0.6180339887498949  # multiples of it are spread evenly and repeat with no rhythm of a text
)
_BLOCK = 128  # queries at once


@dataclass(frozen=True, kw_only=True)
class BitMenu:
    """What is measured in few bits.

    The last of `keys` and of `values` are the coarsest: heads are ablated by them, and losers
    demoted to them.  `demoted` are the indices of the candidates that do so; `joint` are whole
    actions, each with the tokens of some candidate, that check what a planner adds up.
    """

    keys: tuple[Precision, ...]
    values: tuple[Precision, ...]
    demoted: tuple[int, ...] = ()
    joint: tuple[KVAction, ...] = ()


def stored(x: Tensor, precision: Precision) -> Tensor:
    """The numbers `[..., n, D]` (float32) that come back once all whole groups were packed."""
    format, n = packing(precision), x.shape[-2]
    if format is None:
        return x.float()
    whole = n - n % (precision.group or 1) if precision.axis == "channel" else n
    if whole == 0:
        return x.float()
    older = dequantize(quantize(x[..., :whole, :].contiguous(), format))
    return torch.cat([older, x[..., whole:, :].float()], -2)


def bit_statistics(
    step: Step,
    context: int,
    key: Tensor,
    value: Tensor,
    candidates: Sequence[KVAction],
    outcomes: Sequence[object],
    menu: BitMenu,
) -> dict[str, Tensor]:
    """One layer's `key_damage`, `value_damage`, `demoted_damage` and `joint_damage`.

    Shapes and units are those of `cacheplan.types.KVProfile`, without the axis "layer"; `outcomes`
    are the `Nested` sets of tokens of the candidates, for keys `[1, K, context + T, D]`.  Half of
    the continuation's queries are asked.
    """
    found = precision_damage(step, context, key, value, menu)
    nested = [_nested(outcomes[a]) for a in menu.demoted]
    if nested:
        found["demoted_damage"] = demoted_damage(step, context, key, value, nested, menu)
    joint = []
    for action in menu.joint:
        own = _nested(outcomes[candidates.index(bare(action))])
        joint.append(joint_damage(step, context, key, value, own, action))
    if joint:
        found["joint_damage"] = torch.stack(joint, -1)
    return found


def _nested(outcome: object) -> Nested:
    assert isinstance(outcome, Nested), "what is merged has no tiers"
    return outcome


def precision_damage(
    step: Step, context: int, key: Tensor, value: Tensor, menu: BitMenu
) -> dict[str, Tensor]:
    """Squared output error with the whole context in each precision, `[K, precisions]` float64.

    Keys and values one at a time, the other as they are; the unit is `eviction_damage`'s.
    """
    head, late = key[0, :, :context], value[0, :, :context]
    keys = [stored(head, precision) for precision in menu.keys]
    values = [stored(late, precision) for precision in menu.values]
    sums_k = torch.zeros(key.shape[1], len(keys), dtype=torch.float64, device=key.device)
    sums_v = torch.zeros(key.shape[1], len(values), dtype=torch.float64, device=key.device)
    for block in _blocks(step, context, key, value):
        h = block.head
        weights = block.weights(block.keys)
        full = block.output(weights, block.values)
        for f, other in enumerate(keys):
            found = block.output(block.weights(other[h]), block.values)
            sums_k[h, f] += _squared(found - full)
        for f, other in enumerate(values):
            found = block.output(weights, _counted(other[h]))
            sums_v[h, f] += _squared(found - full)
    asked = len(asked_queries(step.query.shape[2] - context))
    return {"key_damage": sums_k / asked, "value_damage": sums_v / asked}


def demoted_damage(
    step: Step,
    context: int,
    key: Tensor,
    value: Tensor,
    candidates: Sequence[Nested],
    menu: BitMenu,
) -> Tensor:
    """Squared output error where losers alone have few bits, `[K, A, G, 2]` (keys, values) float64.

    Losers are in the coarsest precision of the menu, in the groups of the whole context.  As in
    `eviction_damage`, all fractions are running sums over one ranking: of the tokens that stay as
    they are, and of the others in few bits.
    """
    coarse_key = stored(key[0, :, :context], menu.keys[-1])
    coarse_value = stored(value[0, :, :context], menu.values[-1])
    K, fractions = key.shape[1], len(candidates[0].counts[0])
    shape = K, len(candidates), fractions, 2
    sums = torch.zeros(shape, dtype=torch.float64, device=key.device)
    for block in _blocks(step, context, key, value):
        h = block.head
        weights, coarse = block.weights(block.keys), block.weights(coarse_key[h])
        full = block.output(weights, block.values)
        few = _counted(coarse_value[h])
        totals = coarse @ block.values + block.rest, weights @ few + block.rest
        for a, nested in enumerate(candidates):
            order, ends = nested.order[h], nested.counts[h]
            # what a token adds as it is, less what it added in few bits
            own, values = weights[..., order], block.values[order]
            by_key, by_value = own - coarse[..., order], values - few[order]
            parts = [slice(*ends) for ends in zip([0, *ends], ends, strict=False)]
            swaps = (
                torch.stack([by_key[..., part] @ values[part] for part in parts]),
                torch.stack([own[..., part] @ by_value[part] for part in parts]),
            )
            for tensor in (0, 1):
                outcome = totals[tensor] + swaps[tensor].cumsum(0)  # [G, group, t, Dv + 1]
                found = outcome[..., :-1] / outcome[..., -1:].clamp(min=1e-30)
                sums[h, a, :, tensor] += (found - full).double().square().sum((1, 2, 3))
    return sums / len(asked_queries(step.query.shape[2] - context))


def joint_damage(
    step: Step, context: int, key: Tensor, value: Tensor, nested: Nested, action: KVAction
) -> Tensor:
    """Squared output error of a whole action, packed as the runtime packs it, `[K]` float64."""
    (count,) = kept_counts([action.keep], context)
    sums = torch.zeros(key.shape[1], dtype=torch.float64, device=key.device)
    kept = nested.order[:, :count].sort(-1).values
    losers = nested.order[:, count:].sort(-1).values
    keys, values = _tiered(key[0], value[0], kept, losers, action)
    for block in _blocks(step, context, key, value):
        full = block.output(block.weights(block.keys), block.values)
        found = block.output(block.weights(keys[block.head]), _counted(values[block.head]))
        sums[block.head] += _squared(found - full)
    return sums / len(asked_queries(step.query.shape[2] - context))


def coarsened(
    key: Tensor, value: Tensor, menu: BitMenu, at_once: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of a context `[1, K, C, D]` where one head's keys, or values, are coarsest.

    Batches of at most `at_once`; entry 2h has head h's keys in few bits, entry 2h + 1 its values.
    """
    K = key.shape[1]
    few_keys, few_values = stored(key, menu.keys[-1]), stored(value, menu.values[-1])
    keys, values = (x.expand(2 * K, -1, -1, -1).clone() for x in (key, value))
    for h in range(K):
        keys[2 * h, h] = few_keys[0, h].to(key.dtype)
        values[2 * h + 1, h] = few_values[0, h].to(value.dtype)
    return list(torch.split(keys, at_once)), list(torch.split(values, at_once))


def _tiered(
    key: Tensor, value: Tensor, kept: Tensor, losers: Tensor, action: KVAction
) -> tuple[Tensor, Tensor]:
    """Keys and values `[K, n, D]` as an action stores the tokens `kept` `[K, n]` and `losers`.

    They come in any order.
    """
    tokens = divide(action, kept.shape[1], losers.shape[1])
    parts = [(kept[:, : tokens.high], Tier(key=action.key, value=action.value))]
    exact = kept[:, tokens.high :]
    if action.low is not None:
        parts.append((losers[:, : tokens.low], action.low))
        exact = torch.cat([exact, losers[:, tokens.low :]], 1)
    parts.append((exact, Tier(key=_PLAIN, value=_PLAIN)))
    head = torch.arange(len(kept), device=kept.device)[:, None]
    keys = [stored(key[head, own], tier.key) for own, tier in parts]
    values = [stored(value[head, own], tier.value) for own, tier in parts]
    return torch.cat(keys, 1), torch.cat(values, 1)


@dataclass(frozen=True, eq=False)
class _Block:
    """Some queries of the continuation at one kv head, and what they see.

    `most` is what logits are shifted by; coarse keys may pass it, but not by so much that float32
    ends.  Values carry a last channel of ones, so that one product sums numerator and denominator.
    """

    head: int
    query: Tensor  # [G, t, D]
    keys: Tensor  # [C, D], of the context
    values: Tensor  # [C, Dv + 1]
    rest: Tensor  # [G, t, Dv + 1], what comes from outside of the context
    most: Tensor  # [G, t, 1]
    scale: float
    softcap: float | None

    def weights(self, keys: Tensor) -> Tensor:
        return (capped(self.query @ keys.T * self.scale, self.softcap) - self.most).exp()

    def output(self, weights: Tensor, values: Tensor) -> Tensor:
        whole = weights @ values + self.rest
        return whole[..., :-1] / whole[..., -1:]


def asked_queries(count: int) -> list[int]:
    """Which of so many queries are asked, ascending; the first always is."""
    return [i for i in range(count) if i * _GOLDEN % 1 < _ASKED]


def _blocks(step: Step, context: int, key: Tensor, value: Tensor) -> Iterator[_Block]:
    K, S = key.shape[1], key.shape[2]
    G = step.query.shape[1] // K
    asked = torch.tensor(asked_queries(S - context), device=key.device) + context
    sinks = None if step.sinks is None else step.sinks.float().view(K, G, 1, 1)
    for h in range(K):
        keys, values = key[0, h].float(), _counted(value[0, h].float())
        group = step.query[0, h * G : (h + 1) * G].float()
        for rows in torch.split(asked, _BLOCK):
            query = group[:, rows]
            logits = capped(query @ keys.T * step.scale, step.softcap)
            logits[..., context:].masked_fill_(
                torch.arange(context, S, device=key.device) > rows[:, None], float("-inf")
            )
            most = logits.amax(-1, keepdim=True)
            aside = torch.zeros((), device=key.device)
            if sinks is not None:
                most = torch.maximum(most, sinks[h])
                aside = (sinks[h] - most).exp()
            rest = (logits[..., context:] - most).exp() @ values[context:]
            rest[..., -1:] += aside
            own = keys[:context], values[:context]
            yield _Block(h, query, *own, rest, most, step.scale, step.softcap)


def _counted(values: Tensor) -> Tensor:
    """Values with a last channel of ones."""
    return pad(values, (0, 1), value=1.0)


def _squared(error: Tensor) -> Tensor:
    return error.double().square().sum()
