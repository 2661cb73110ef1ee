"""A contact sheet: one row a label, with pictures taken at even steps through the set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gptfl_dist.files import write_file
from gptfl_dist.synthesis import store

_GAP = 4
_CELL = (64, 96)
_NAME_WIDTH = 240


def contact_sheet(folder: Path, path: Path, per_label: int = 10) -> None:
    """Write a PNG of `per_label` pictures of each label of the finished set in `folder`.

    Small pictures are enlarged by a whole factor without smoothing, large ones reduced. Raises StorageError.
    """
    manifest = store.complete_manifest(folder)
    request = manifest.request
    columns = min(per_label, request.images_per_label)
    indices = np.linspace(0, request.images_per_label - 1, columns).round().astype(int)
    # Samples are interleaved: the index-th picture of a label is row index * labels + label of the whole set.
    wanted = {
        int(index) * len(request.labels) + label: (label, column)
        for label in range(len(request.labels))
        for column, index in enumerate(indices)
    }

    cell = _cell(request.task.size)
    font = ImageFont.load_default(size=16)
    names = [_fitted(label, font) for label in request.labels]
    left = int(max(font.getlength(name) for name in names)) + 3 * _GAP
    step = cell + _GAP
    mode = "L" if request.task.channels == 1 else "RGB"
    sheet = Image.new(mode, (left + columns * step, len(names) * step + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for label, name in enumerate(names):
        draw.text((2 * _GAP, _GAP + label * step + cell // 2), name, fill="black", font=font, anchor="lm")

    for number in sorted({row // request.shard_size for row in wanted}):
        pictures, _ = store.read_shard(folder, manifest.shards[number], request.task.channels)
        for row, picture in enumerate(pictures, start=number * request.shard_size):
            if row in wanted:
                label, column = wanted[row]
                sheet.paste(_scaled(picture, cell), (left + column * step, _GAP + label * step))

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


def _fitted(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(name) <= _NAME_WIDTH:
        return name
    while font.getlength(name + "...") > _NAME_WIDTH:
        name = name[:-1]
    return name + "..."
