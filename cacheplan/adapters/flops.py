"""Counting FLOPs of the denoiser, alike on every device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from cacheplan.adapters.taps import compiled, replaced


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def flop_counter() -> FlopCounterMode:
    """torch's counter, which by itself misses the fused attention of CPUs."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: _attention})


@contextmanager
def uncompiled(root: nn.Module) -> Iterator[None]:
    """Run a module and those inside of it without their compiled code, which hides FLOPs."""
    with ExitStack() as stack:
        for module in filter(compiled, list(root.modules())):
            inside = module._modules.get("_orig_mod")  # torch.compile(module)
            plain = {"forward": inside} if inside is not None else {"_compiled_call_impl": None}
            stack.enter_context(replaced(module, plain))
        # the counter's hooks fire twice there, which does no harm
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        yield
