"""Random affine and elastic warps of a batch, the same in every arm, by kornia.

Each image gets its own rotation, scale, shear and shift, and a smooth displacement. There are no flips: a mirrored 2 is
no 2. kornia draws from torch's global generator, on the CPU whatever the images' device; here it is seeded for every
batch by the caller's generator, and left as it was.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

ROTATION = 20.0  # degrees
SCALE = (0.78, 1.28)  # width and height apart
SHEAR = 17.0  # degrees
SHIFT = 0.08  # of the image's side
SMOOTHNESS = 1 / 8  # standard deviation of the blur that smooths the displacements, of the image's side
ELASTIC = 0.1  # standard deviation of the displacements, in units of half the image's side


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Warped copies of float32 images (N, C, H, H), of the same shape. What comes in from outside repeats the edge."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        warped: torch.Tensor = _warps(images.shape[-1])(images)
    return warped


@functools.lru_cache
def _warps(side: int) -> nn.Module:
    """The warps for images of `side` pixels."""
    from kornia.augmentation import RandomAffine, RandomElasticTransform

    sigma = side * SMOOTHNESS
    kernel = 2 * math.ceil(2 * sigma) + 1
    # kornia blurs noise from -1 to 1, of variance 1/3. A Gaussian of sigma s leaves 1 / (4 pi s^2) of the variance.
    alpha = ELASTIC * math.sqrt(3 * 4 * math.pi) * sigma
    return nn.Sequential(
        RandomAffine(ROTATION, (SHIFT, SHIFT), (*SCALE, *SCALE), (-SHEAR, SHEAR), padding_mode="border", p=1.0),
        RandomElasticTransform((kernel, kernel), (sigma, sigma), (alpha, alpha), padding_mode="border", p=1.0),
    )
