"""LPIPS is measured where package and weights are present; nothing is ever downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cacheplan.errors import InputError
from cacheplan.perceptual import SMALLEST, Lpips, missing, weights_file

rng = np.random.default_rng(0)
A = rng.random((40, 36, 3))
B = np.clip(A + 0.2 * rng.standard_normal(A.shape), 0, 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    sentence = missing()
    assert sentence is not None
    assert 'pip install "cacheplan[lpips]"' in sentence


def test_a_missing_file_is_named(lpips_stand_in: Path) -> None:
    lpips_stand_in.unlink()
    sentence = missing()
    assert sentence is not None
    assert f"{lpips_stand_in} is missing" in sentence
    lpips_stand_in.write_bytes(b"weights")
    assert missing() is None


def test_pictures_are_given_from_minus_one_to_one(lpips_stand_in: Path) -> None:
    before = torch.get_rng_state()
    distance = Lpips()
    assert torch.equal(torch.get_rng_state(), before), "runs may draw from it"
    assert distance(A, A) == 0
    assert distance(A, B) == pytest.approx(2 * np.abs(A - B).mean(), rel=1e-5)
    assert distance(A, B) == distance(B, A)
    assert distance(A[: SMALLEST - 1], B[: SMALLEST - 1]) is None
    assert distance(A[:SMALLEST, :SMALLEST], B[:SMALLEST, :SMALLEST]) is not None


def test_damaged_weights_are_named(lpips_stand_in: Path) -> None:
    lpips_stand_in.write_bytes(b"")
    assert missing() is None
    with pytest.raises(InputError, match=r"00\.pth does not hold .* \(Ran out of input\): delete"):
        Lpips()


def test_a_torchvision_for_another_torch_is_named(lpips_stand_in: Path, tmp_path: Path) -> None:
    module = tmp_path / "packages" / "torchvision" / "__init__.py"
    module.write_text("raise RuntimeError('no operator nms\\nand more')")
    sentence = missing()
    assert sentence is not None
    assert "(no operator nms): install the build of torchvision" in sentence
    assert sentence.endswith(f"torch {torch.__version__}.")


def test_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With AlexNet's own architecture and random weights, which the package reads as it would."""
    reason = missing()
    if reason and "is missing: python" not in reason:
        pytest.skip(reason)
    from torchvision.models import AlexNet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights_file().parent.mkdir(parents=True)
    torch.save(AlexNet().state_dict(), weights_file())
    assert missing() is None
    distance = Lpips()
    near, far = (A + B) / 2, 1 - A
    assert distance(A, A) == 0
    found = [distance(A, other) for other in (near, B, far)]
    assert all(value is not None and value > 0 for value in found)
    assert found[0] < found[1] < found[2]  # type: ignore[operator]
    assert distance(A[:SMALLEST, :SMALLEST], B[:SMALLEST, :SMALLEST]) is not None
    weights_file().write_bytes(b"abc")
    with pytest.raises(InputError, match="does not hold AlexNet's weights"):
        Lpips()
