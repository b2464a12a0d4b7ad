"""A digest of models: configuration and a sample of every weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 64  # weights per tensor that enter the digest


def digest(models: Iterable[tuple[Mapping[str, Any], Mapping[str, Tensor]]]) -> str:
    """sha256 over configurations and evenly spaced weights of every tensor of each model.

    Weights enter rounded to bfloat16, so that a float32 and a bfloat16 load of one checkpoint
    count as the same model.
    """
    result = hashlib.sha256()
    for config, weights in models:
        result.update(json.dumps(dict(config), sort_keys=True, default=str).encode())
        for name in sorted(weights):
            tensor = weights[name]  # one at a time: they may have to be fetched
            flat = tensor.detach().flatten()
            step = max(1, flat.numel() // _SAMPLED)
            sample = flat[::step][:_SAMPLED].to("cpu", torch.bfloat16).view(torch.int16)
            result.update(f"{name}{tuple(tensor.shape)}".encode())
            result.update(sample.numpy().tobytes())
    return f"sha256:{result.hexdigest()}"
