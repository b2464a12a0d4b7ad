"""Packages `lpips` and `torchvision` that do as much as is asked of them here."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = "alexnet-owt-00000000.pth"
LPIPS = """
import os, pathlib, warnings
import torch

class LPIPS(torch.nn.Module):
    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex" and not verbose
        warnings.warn("deprecated")
        torch.rand(3)  # as weights that are drawn before they are read
        home = pathlib.Path(os.environ["TORCH_HOME"])
        if (home / "hub" / "checkpoints" / "%s").read_bytes() != b"weights":
            raise EOFError("Ran out of input")

    def forward(self, a, b):
        assert a.shape == b.shape and a.shape[:2] == (1, 3) and a.dtype == torch.float32
        assert a.min() >= -1 and a.max() <= 1
        return (a - b).abs().mean().reshape(1, 1, 1, 1)
"""
TORCHVISION = """
import enum, types

class AlexNet_Weights(enum.Enum):
    IMAGENET1K_V1 = types.SimpleNamespace(url="https://example.org/models/%s")

    @property
    def url(self):
        return self.value.url
"""


def install(folder: Path) -> None:
    """Write the packages into an empty folder."""
    (folder / "lpips").mkdir()
    (folder / "lpips" / "__init__.py").write_text(LPIPS % WEIGHTS)
    (folder / "torchvision" / "models").mkdir(parents=True)
    (folder / "torchvision" / "__init__.py").write_text("")
    (folder / "torchvision" / "models" / "__init__.py").write_text(TORCHVISION % WEIGHTS)
