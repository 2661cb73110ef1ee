"""Random changes of a batch of spectrograms, the same in every arm: other speakers, rates, rooms; and SpecAugment.

Each clip gets its own shift and stretch in time, and its own shift and stretch along the mel axis, as of a shorter or
longer vocal tract (Jaitly, Hinton 2013): one sampling grid and one `grid_sample`. Then its gain changes, which lets the
faint parts come or go, and one band of frequencies and one stretch of time are masked (SpecAugment, arXiv:1904.08779).
Draws are made on the CPU by the caller's generator, so they are the same whatever the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TIME_SHIFT = 0.1  # of the clip
TIME_STRETCH = 0.15  # of its natural logarithm
BAND_SHIFT = 0.03  # of the bands
BAND_STRETCH = 0.06
GAIN = 0.08  # of what lies between silence and the loudest
TIME_MASK = 0.05  # of the clip, at most
BAND_MASK = 0.05  # of the bands, at most


def augment_spectrograms(
    images: torch.Tensor, generator: torch.Generator, *, batch: int | None = None, part: slice = slice(None)
) -> torch.Tensor:
    """Changed copies of float32 spectrograms (N, 1, bins, windows), of the same shape.

    What comes in from outside repeats the edge; a clip's least value stands for silence. `images` may be the `part` of
    a larger `batch`: draws are made for all of it, so each clip gets the same ones.
    """
    count, _, height, width = images.shape
    draws = torch.rand(batch or count, 9, generator=generator)[part].to(images.device)
    signed = draws[:, :5] * 2 - 1
    none = torch.zeros_like(signed[:, 0])
    # Grids reach from -1 to 1, so a shift of a side's share counts twice.
    affine = torch.stack(
        [
            torch.stack([torch.exp(signed[:, 0] * TIME_STRETCH), none, signed[:, 1] * TIME_SHIFT * 2], dim=1),
            torch.stack([none, torch.exp(signed[:, 2] * BAND_STRETCH), signed[:, 3] * BAND_SHIFT * 2], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(affine, [count, 1, height, width], align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    silence, loudest = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    gain = signed[:, 4].view(-1, 1, 1, 1) * GAIN * (loudest - silence)
    louder = torch.minimum(torch.maximum(moved + gain, silence), loudest)
    masked = _mask(width, draws[:, 5], draws[:, 6] * TIME_MASK)[:, None, None, :]
    masked = masked | _mask(height, draws[:, 7], draws[:, 8] * BAND_MASK)[:, None, :, None]
    return torch.where(masked, silence, louder)


def _mask(size: int, place: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """For each of N draws the places (N, size) that are masked: a share of all of them, from somewhere on."""
    at = (torch.arange(size, device=place.device) + 0.5) / size
    start = (place * (1 - share))[:, None]
    return (at >= start) & (at < start + share[:, None])
