"""LPIPS, a learned distance of pictures, where its package and its weights are on this machine."""

from __future__ import annotations

import pickle
import warnings
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import torch

from cacheplan.errors import InputError
from cacheplan.pictures import Floats

SMALLEST = 31  # pixels: AlexNet pools what is smaller down to nothing
DOWNLOAD = 'python -c "import lpips; lpips.LPIPS()"'


class Lpips:
    """Learned perceptual distance (Zhang et al., CVPR 2018, arXiv 1801.03924), of AlexNet.

    0 for equal pictures.  It is computed on the CPU in float32 by the package `lpips` with its
    weights of version 0.1.  Only to be made where nothing is `missing`: it would download AlexNet.
    Raises InputError if the file of AlexNet's weights is damaged.
    """

    def __init__(self) -> None:
        import lpips

        # it asks torchvision in a way that is deprecated, and draws weights before it reads them
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            try:
                self._network = lpips.LPIPS(net="alex", verbose=False)
            except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
                raise InputError(
                    f"{weights_file()} does not hold AlexNet's weights ({_line(error)}): delete "
                    f"it, or fetch it again by {DOWNLOAD}."
                ) from error

    def __call__(self, a: Floats, b: Floats) -> float | None:
        """The distance of `[H, W, 3]` from 0 to 1; None of pictures smaller than `SMALLEST`."""
        if min(a.shape[:2]) < SMALLEST:
            return None
        with torch.inference_mode():
            one, other = (torch.from_numpy(x).float().permute(2, 0, 1)[None] for x in (a, b))
            return float(self._network(2 * one - 1, 2 * other - 1))


def missing() -> str | None:
    """What to do so that LPIPS can be measured, a sentence; None if nothing is missing."""
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        return 'LPIPS is not measured, its package is missing: pip install "cacheplan[lpips]".'
    try:
        file = weights_file()
    except (ImportError, RuntimeError, OSError) as error:  # of a torchvision for another torch
        return (
            f"LPIPS is not measured, torchvision does not load ({_line(error)}): install the "
            f"build of torchvision that was made for torch {torch.__version__}."
        )
    if not file.is_file():
        return f"LPIPS is not measured, {file} is missing: {DOWNLOAD} fetches it."
    return None


def weights_file() -> Path:
    """Where torchvision keeps the weights of AlexNet."""
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.IMAGENET1K_V1.url
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(":.")
