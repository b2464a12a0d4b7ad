"""Pictures in rows and columns with words above and beside them, and writing one picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheplan.atomic import atomic_write
from cacheplan.errors import InputError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
GAP, MARGIN = 8, 12  # pixels
SMALLEST = 192  # width of a column, so that words fit
TEXT = 13  # pixels
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def check_picture_file(path: Path) -> None:
    """InputError for names that no picture can be written to, before it is made."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f'{path} has the ending "{path.suffix}", but pictures are written as '
            f"{', '.join(FORMATS)}."
        )
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"cannot write {path}; choose a folder that exists, may be written to and has room"
        )


def write_picture(picture: Any, path: Path) -> None:
    """Write a PIL image whole or not at all, in the format of the file's name."""
    kind = FORMATS[path.suffix.lower()]
    data = io.BytesIO()
    (picture.convert("RGB") if kind == "JPEG" else picture).save(data, format=kind)
    atomic_write(path, data.getvalue())


def grid(
    rows: Sequence[Sequence[Any]],
    titles: Sequence[str],
    captions: Sequence[str],
    names: Sequence[str],
) -> Any:
    """One PIL image of `rows` of PIL images.

    Above each column stand its title and, fainter, its caption; above each row its name.
    Pictures smaller than `SMALLEST` are enlarged by a whole number, without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = rows[0][0].size
    times = max(1, -(-SMALLEST // width))
    width, height = width * times, height * times
    line = TEXT + 5
    top, step = MARGIN + 2 * line + GAP, line + height + GAP
    size = 2 * MARGIN + len(titles) * (width + GAP) - GAP, top + len(rows) * step + MARGIN - GAP
    sheet = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)

    def write(x: int, y: int, text: str, room: int, colour: tuple[int, int, int]) -> None:
        while text and pen.textlength(text, font=font) > room:
            text = text[:-2] + "…" if len(text) > 2 else ""
        pen.text((x, y), text, font=font, fill=colour)

    for column, (title, caption) in enumerate(zip(titles, captions, strict=True)):
        x = MARGIN + column * (width + GAP)
        write(x, MARGIN, title, width, INK)
        write(x, MARGIN + line, caption, width, FAINT)
    for index, (pictures, name) in enumerate(zip(rows, names, strict=True)):
        y = top + index * step
        write(MARGIN, y, name, size[0] - 2 * MARGIN, FAINT)
        for column, picture in enumerate(pictures):
            x = MARGIN + column * (width + GAP)
            shown = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (x, y + line))
    return sheet
