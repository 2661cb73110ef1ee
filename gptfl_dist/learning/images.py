"""One image from what a silo has of it: a file, its bytes, or an array. Pixels are touched only where they must be.

That is where size or channels differ from the task's.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gptfl_dist.config.task import Task
from gptfl_dist.errors import DataError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_REPLACE = "replace it, or remove it from the data"


def pixels(where: str, raw: Path | bytes | np.ndarray, task: Task) -> np.ndarray:
    """One image as uint8 (C, size, size)."""
    if isinstance(raw, np.ndarray) and raw.shape == (task.size, task.size):
        raw = raw[:, :, None]
    if isinstance(raw, np.ndarray) and raw.shape == (task.size, task.size, task.channels):
        return raw.transpose(2, 0, 1)
    image = _decode(where, raw)
    mode = "L" if task.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (task.size, task.size):
        image = image.resize((task.size, task.size), Image.Resampling.BICUBIC)
    values = np.asarray(image)
    return values[None] if task.channels == 1 else values.transpose(2, 0, 1)


def _decode(where: str, raw: Path | bytes | np.ndarray) -> Image.Image:
    """The image with 8 bits a channel, turned upright. Raises DataError where it is damaged or unreasonably large."""
    try:
        if isinstance(raw, np.ndarray):
            return Image.fromarray(raw[:, :, 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw)
        with Image.open(io.BytesIO(raw) if isinstance(raw, bytes) else raw) as opened:
            # Pillow itself only warns up to twice its limit.
            if Image.MAX_IMAGE_PIXELS is not None and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"it has {opened.width} x {opened.height} pixels")
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits a channel")
        return image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"the image {where} is too large to decode safely: {error}",
            hint=f"scale it down to at most {Image.MAX_IMAGE_PIXELS} pixels, or remove it from the data",
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(f"the image {where} is damaged, empty or of no known format", hint=_REPLACE) from error
    except Exception as error:  # a decoder may raise nearly anything on a damaged file
        raise DataError(f"the image {where} cannot be decoded: {error or repr(error)}", hint=_REPLACE) from error
