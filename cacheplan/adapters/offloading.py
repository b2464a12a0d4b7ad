"""Models whose weights are not all in memory: hooks of accelerate fetch them when a module runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cacheplan.errors import InputError
from cacheplan.placement import Placement


def placement_arguments(placement: Placement | None, device: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs to divide a model; InputError if it cannot be done."""
    if placement is None:
        return {}
    if device is not None:
        raise InputError(f"Both --device {device} and a device map are given: leave out one.")
    if find_spec("accelerate") is None:
        raise InputError(
            "Dividing a model over devices needs the package accelerate: "
            'run `pip install "cacheplan[llm]"`.'
        )
    where, most = placement.device_map, placement.max_memory
    return {
        "device_map": where if isinstance(where, str) else dict(where),
        "max_memory": most and dict(most),  # transformers changes it
        "offload_folder": placement.offload_folder,
    }


def input_device(model: Any) -> torch.device:
    """Where token ids belong; an offloaded embedding is itself on no device."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return torch.device(model.device if place is None else place)


class Weights(Mapping[str, Tensor]):
    """A model's state dict, of which offloaded tensors are fetched one at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._state = model, model.state_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        if not tensor.is_meta:
            return tensor
        from accelerate.utils import align_module_device

        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        with align_module_device(module, torch.device("cpu")):
            fetched: dict[str, Tensor] = module.state_dict()
        return fetched[leaf]
