"""Contact sheets: one row a label, of what a synthetic set holds and of what its filter dropped.

Clips are shown as their spectrograms.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gptfl_dist.files import write_file
from gptfl_dist.synthesis import store
from gptfl_dist.synthesis.selection import Selection
from gptfl_dist.synthesis.store import Manifest

_GAP = 4
_CELL = (64, 96)
_NAME_WIDTH = 240
_NAME_SIZE, _CAPTION_SIZE = 16, 11
_CAPTION_WIDTH = 110


@dataclass(frozen=True)
class _Row:
    """A row of a sheet: its name, and of each picture its place in the set with what is written below it."""

    name: str
    pictures: Mapping[int, str]


def contact_sheet(folder: Path, path: Path, selection: Selection | None = None, per_label: int = 10) -> None:
    """Write a PNG of `per_label` pictures of each label of the finished set in `folder`, at even steps through it.

    Only of those that are kept, where there is a selection. Small pictures are enlarged by a whole factor without
    smoothing, large ones reduced. Raises StorageError.
    """
    manifest = store.complete_manifest(folder)
    request = manifest.request
    rows = []
    for label, name in enumerate(request.labels):
        # Samples are interleaved: the index-th picture of a label is row index * labels + label of the whole set.
        mine: Sequence[int] = range(label, request.count, len(request.labels))
        if selection is not None:
            mine = [at for at in mine if selection.keeps[at]]
        rows.append(_Row(name, dict.fromkeys(_even_steps(mine, per_label), "")))
    _write(folder, manifest, path, rows)


def dropped_sheet(folder: Path, path: Path, selection: Selection, per_label: int = 10) -> bool:
    """Write a PNG of pictures that the judge rejected, from its surest to its least sure; below each what it saw.

    One row for each label that was asked for and lost pictures. False, and nothing is written, where none did. Raises
    StorageError.
    """
    answers, font = selection.answers, ImageFont.load_default(size=_CAPTION_SIZE)
    rows = []
    for label, name in enumerate(selection.labels):
        captions = {}
        for at in _even_steps(selection.rejected(label), per_label):
            judged = answers.judged[at]
            seen = "none of them" if judged is None else selection.labels[judged]
            captions[at] = f"{_fitted(seen, font, _CAPTION_WIDTH)} {answers.certainty[at]:.2f}"
        if captions:
            rows.append(_Row(f"asked: {name}", captions))
    if rows:
        _write(folder, store.complete_manifest(folder), path, rows)
    return bool(rows)


def _even_steps(places: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the places, the first and the last among them."""
    if not places:
        return []
    return [places[at] for at in np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)]


def _write(folder: Path, manifest: Manifest, path: Path, rows: Sequence[_Row]) -> None:
    task, shard_size = manifest.request.task.shown_as, manifest.request.shard_size
    channels, *sides = task.shape
    cell = _cell(max(sides))
    name_font, font = ImageFont.load_default(size=_NAME_SIZE), ImageFont.load_default(size=_CAPTION_SIZE)
    names = [_fitted(row.name, name_font, _NAME_WIDTH) for row in rows]
    captions = [text for row in rows for text in row.pictures.values()]
    left = int(max(name_font.getlength(name) for name in names)) + 4 * _GAP
    across = max([cell, *(int(font.getlength(text)) + _GAP for text in captions)]) + _GAP
    down = cell + _GAP + (_CAPTION_SIZE + _GAP if any(captions) else 0)
    columns = max(len(row.pictures) for row in rows)
    mode = "L" if channels == 1 else "RGB"
    sheet = Image.new(mode, (left + columns * across, len(rows) * down + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    places: dict[int, tuple[int, int]] = {}
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = _GAP + number * down
        draw.text((2 * _GAP, top + cell // 2), name, fill="black", font=name_font, anchor="lm")
        for column, (at, caption) in enumerate(row.pictures.items()):
            places[at] = left + column * across, top
            draw.text((left + column * across, top + cell + 1), caption, fill="black", font=font, anchor="la")

    for number in sorted({at // shard_size for at in places}):
        pictures, _ = store.read_shard(folder, manifest.shards[number], task)
        for at, picture in enumerate(pictures, start=number * shard_size):
            if at in places:
                # A spectrogram's first row is its lowest band, which people look for at the bottom.
                upright = picture[::-1] if task.kind == "audio" else picture
                sheet.paste(_scaled(upright, cell), places[at])

    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    write_file(path, buffer.getvalue())


def _cell(size: int) -> int:
    smallest, largest = _CELL
    return min(size * -(-smallest // size), largest) if size < smallest else min(size, largest)


def _scaled(picture: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    how = Image.Resampling.NEAREST if image.width <= cell else Image.Resampling.LANCZOS
    return image.resize((cell, cell), how)


def _fitted(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(name) <= width:
        return name
    while font.getlength(name + "...") > width:
        name = name[:-1]
    return name + "..."
