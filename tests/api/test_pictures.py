"""Distances of pictures against their formulas written out, and grids of pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cacheplan.errors import InputError
from cacheplan.picture_grid import SMALLEST, check_picture_file, grid, write_picture
from cacheplan.pictures import K1, K2, SIGMA, WIDTH, pixels, psnr, square_error, ssim

rng = np.random.default_rng(0)
A = rng.random((15, 13, 3))
B = np.clip(A + 0.2 * rng.standard_normal(A.shape), 0, 1)


def test_ssim_is_the_formula_of_every_window() -> None:
    at = np.arange(WIDTH) - WIDTH // 2
    one = np.exp(-(at**2) / (2 * SIGMA**2))
    window = np.outer(one, one) / np.outer(one, one).sum()
    values = []
    for c in range(3):
        for i in range(15 - WIDTH + 1):
            for j in range(13 - WIDTH + 1):
                a, b = (x[i : i + WIDTH, j : j + WIDTH, c] for x in (A, B))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                both = (window * (a - ma) * (b - mb)).sum()
                light = (2 * ma * mb + K1**2) / (ma**2 + mb**2 + K1**2)
                values.append(light * (2 * both + K2**2) / (va + vb + K2**2))
    assert ssim(A, B) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_equal_small_and_inverted_pictures() -> None:
    assert ssim(A, A) == pytest.approx(1)
    assert ssim(A[:4, :4], A[:4, :4]) == pytest.approx(1)
    assert ssim(A, 1 - A) < 0.1


def test_psnr_is_in_decibels_and_ends_at_a_hundred() -> None:
    assert square_error(A, A + 0.1) == pytest.approx(0.01)
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0.0) == psnr(1e-30) == 100
    assert psnr(0.5) == pytest.approx(-10 * math.log10(0.5))


def test_pixels_are_shares_of_three_colours() -> None:
    assert pixels(Image.new("L", (2, 3), 255)).shape == (3, 2, 3)
    assert pixels(Image.new("RGBA", (1, 1), (255, 0, 51, 9))).ravel().tolist() == [1, 0, 0.2]


def test_a_grid_holds_every_picture_enlarged() -> None:
    colours = [[(200, 10 * i, 50 * j) for j in range(3)] for i in range(2)]
    rows = [[Image.new("RGB", (64, 32), colour) for colour in row] for row in colours]
    sheet = grid(rows, ["full run", "a", "b"], ["", "x" * 99, ""], ["first", "second " * 99])
    counts = {colour: n for n, colour in sheet.getcolors(10**6)}
    assert all(counts[c] == 3 * 64 * 3 * 32 for row in colours for c in row)
    assert sheet.width > 3 * SMALLEST


def test_pictures_are_written_whole_in_the_format_of_their_name(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (1, 2, 3, 255))
    for name, kind in {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP"}.items():
        check_picture_file(tmp_path / name)
        write_picture(picture, tmp_path / name)
        with Image.open(tmp_path / name) as found:
            assert (found.format, found.size) == (kind, (4, 4))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("a.txt", 'the ending ".txt"'), ("no/a.png", "cannot write"), ("folder.png", "cannot write")],
)
def test_names_that_cannot_be_written_are_told_before(
    tmp_path: Path, name: str, sentence: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=sentence):
        check_picture_file(tmp_path / name)
