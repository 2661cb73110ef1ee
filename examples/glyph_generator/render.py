"""Draws digits the way a hand might, starting from the glyphs of a font.

Each glyph is thinned once to a skeleton: points along the middle of its strokes, each with the stroke's radius. Every
picture then bends that skeleton (a smooth random displacement, a change of width, shear, rotation) and inks it again
with a round pen, or with the glyph's own stroke profile. What comes out has the geometry of MNIST: white on black, the
longer side 20 pixels, centred by mass; here inside 32 x 32, which a VAE halves twice without remainder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fonts import Face
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

SIZE = 32
BOX = 20.0
OVERSAMPLING = 4
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_TRACED_HEIGHT = 112
_OWN_PROFILE_SHARE = 0.4
_BARE_ONE_SHARE = 0.6
_THIN, _BOLD = 0.95, 1.4
_LEAN = 0.13

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Glyph:
    """The skeleton of a face's digit: points in [-1, 1] (x, y) and the stroke's radius there, in the same unit."""

    digit: int
    points: Floats
    radii: Floats

    @property
    def is_bare_stroke(self) -> bool:
        """Whether a one is a plain stroke, without flag or foot, as most people write it."""
        spread = np.linalg.svd(self.points - self.points.mean(axis=0), compute_uv=False)
        return bool(spread[1] < 0.07 * spread[0])


@dataclass(frozen=True)
class Renders:
    """Pictures and what is known of each: the digit, the pen's radius in pixels, how far the strokes lean right."""

    images: Pixels
    digits: NDArray[np.int64]
    ink: Floats
    slant: Floats

    def captions(self, seed: int, drop: float = 0.2) -> list[str]:
        """One caption a picture. A share leaves each attribute out, so that prompts may leave it out too."""
        rng = np.random.default_rng(seed)
        # A seven leans more than a zero however it is written: lean is told against what is usual for the digit.
        usual = np.array([np.median(self.slant[self.digits == digit]) for digit in range(10)])
        captions = []
        for digit, ink, slant in zip(self.digits, self.ink, self.slant - usual[self.digits], strict=True):
            caption = f"a handwritten digit {WORDS[digit]}"
            weight = "thin" if ink < _THIN else "bold" if ink > _BOLD else ""
            if weight and rng.random() >= drop:
                caption += f", {weight}"
            if rng.random() >= drop:
                caption += ", slanted" if slant > _LEAN else ", leaning left" if slant < -_LEAN else ", upright"
            captions.append(caption)
        return captions


def trace(faces: Sequence[Face], work: Path) -> list[Glyph]:
    """The skeletons of all ten digits of the faces."""
    return [_trace(face.find(work), digit) for face in faces for digit in range(10)]


def _trace(file: Path, digit: int) -> Glyph:
    try:  # here, for who trains on pictures that are not drawn needs it not
        from skimage.morphology import skeletonize
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: install what README.md of this folder lists, scikit-image among it") from None
    text = str(digit)
    probe = ImageFont.truetype(str(file), 200).getbbox(text)
    font = ImageFont.truetype(str(file), round(200 * _TRACED_HEIGHT / (probe[3] - probe[1])))
    left, top, right, bottom = font.getbbox(text)
    page = Image.new("L", (round(right - left) + 16, round(bottom - top) + 16))
    ImageDraw.Draw(page).text((8 - left, 8 - top), text, fill=255, font=font)
    # A little blur first: without it every roughness of a brush face grows a spur on the skeleton.
    solid = gaussian_filter(np.asarray(page, dtype=np.float64), 1.5) > 127
    rows, columns = np.nonzero(skeletonize(solid))
    radii = distance_transform_edt(solid)[rows, columns]
    points = np.stack([columns, rows], axis=1).astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    unit = (high - low).max() / 2
    return Glyph(digit, (points - (low + high) / 2) / unit, radii / unit)


def render(glyphs: Sequence[Glyph], count: int, seed: int) -> Renders:
    """Draw `count` pictures, the ten digits in equal number and mixed order."""
    rng = np.random.default_rng(seed)
    by_digit = [[glyph for glyph in glyphs if glyph.digit == digit] for digit in range(10)]
    bare_ones = [glyph for glyph in by_digit[1] if glyph.is_bare_stroke] or by_digit[1]
    digits = rng.permutation(np.arange(count) % 10)
    images = np.empty((count, SIZE, SIZE), dtype=np.uint8)
    ink, slant = np.empty(count), np.empty(count)
    for index, digit in enumerate(digits):
        # Type loves ones with flag and foot, hands do not.
        choices = bare_ones if digit == 1 and rng.random() < _BARE_ONE_SHARE else by_digit[digit]
        images[index], ink[index], slant[index] = _draw(choices[rng.integers(len(choices))], rng)
    return Renders(images, digits, ink, slant)


def _draw(glyph: Glyph, rng: np.random.Generator) -> tuple[Pixels, float, float]:
    points = _bend(glyph, rng)
    radii = np.full(len(points), rng.normal(1.15, 0.32))
    if rng.random() < _OWN_PROFILE_SHARE:
        radii = glyph.radii * BOX / 2
    radii *= np.clip(radii.mean(), 0.55, 2.1) / radii.mean()
    low, high = points.min(axis=0), points.max(axis=0)
    span = BOX - 2 * radii.mean()
    points = (points - (low + high) / 2) * span / (high - low).max()
    picture = _ink(points * OVERSAMPLING, radii * OVERSAMPLING)
    return picture, float(radii.mean()), _slant(picture)


def _bend(glyph: Glyph, rng: np.random.Generator) -> Floats:
    # A four keeps its meaning only while its gap stays open or closed as drawn: it bears less bending than the others.
    strength = 0.06 if glyph.digit == 4 else 0.10
    lattice = rng.normal(0, strength, (2, 4, 4))
    where = (glyph.points.T[::-1] + 1) * 1.5
    points = glyph.points + np.stack(
        [map_coordinates(axis, where, order=3, mode="nearest") for axis in lattice], axis=1
    )
    points[:, 0] *= np.exp(rng.normal(0, 0.18))
    points[:, 0] -= rng.normal(0.08, 0.22) * points[:, 1]
    angle = np.deg2rad(rng.normal(0, 7))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn.T


def _ink(points: Floats, radii: Floats) -> Pixels:
    side = SIZE * OVERSAMPLING
    # The radius at a pixel is that of the nearest skeleton point.
    cells = np.round(points).astype(int) + side // 2
    radius = np.zeros((side, side))
    radius[cells[:, 1], cells[:, 0]] = radii
    distance, (rows, columns) = distance_transform_edt(radius == 0, return_indices=True)
    fine = np.clip(radius[rows, columns] - distance + 0.5, 0, 1)
    grid = np.arange(side)
    shift = [round(side / 2 - (fine.sum(axis=1 - axis) * grid).sum() / fine.sum()) for axis in (0, 1)]
    fine = np.roll(fine, shift, axis=(0, 1))
    coarse = fine.reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING).mean(axis=(1, 3))
    return np.round(coarse * 255).astype(np.uint8)


def _slant(picture: Pixels) -> float:
    """How far the ink moves right for one pixel up, from the picture's second moments."""
    rows, columns = np.nonzero(picture)
    weights = picture[rows, columns].astype(np.float64)
    y = rows - np.average(rows, weights=weights)
    x = columns - np.average(columns, weights=weights)
    return float(-np.sum(weights * x * y) / np.sum(weights * y * y))
