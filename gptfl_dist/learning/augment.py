"""Random affine and elastic warps of a batch of images, the same in every arm.

Each image gets its own rotation, scale, shear and shift, and a smooth displacement that is drawn on a coarse grid and
interpolated to full size. All of it is one sampling grid and one `grid_sample`: libraries such as kornia sample once
for each kind of warp, which blurs strokes of a pixel or two, and models learnt less from it. There are no flips: a
mirrored 2 is no 2. Draws are made on the CPU by the caller's generator, so they are the same whatever the device; the
grids are made of them on the images' device, for they are as large as the images.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ROTATION = math.radians(20.0)
SCALE = 0.25
SHEAR = 0.3
SHIFT = 0.08  # of the image's side
ELASTIC = 0.1  # standard deviation at the coarse grid's points, in units of half the image's side
ELASTIC_POINTS = 5


def augment(
    images: torch.Tensor, generator: torch.Generator, *, batch: int | None = None, part: slice = slice(None)
) -> torch.Tensor:
    """Warped copies of float32 images (N, C, H, W), of the same shape. What comes in from outside repeats the edge.

    `images` may be the `part` of a larger `batch`: draws are made for all of it, so each image gets the same ones.
    """
    count, _, height, width = images.shape
    device = images.device
    draws = (torch.rand(batch or count, 6, generator=generator) * 2 - 1)[part].to(device)
    angle, shear = draws[:, 0] * ROTATION, draws[:, 1] * SHEAR
    scale_x, scale_y = torch.exp(draws[:, 2] * SCALE), torch.exp(draws[:, 3] * SCALE)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # Rows of scale x rotation x shear; grids reach from -1 to 1, so a shift of the side's share counts twice.
    affine = torch.stack(
        [
            torch.stack([scale_x * cos, scale_x * (shear * cos - sin), draws[:, 4] * SHIFT * 2], dim=1),
            torch.stack([scale_y * sin, scale_y * (shear * sin + cos), draws[:, 5] * SHIFT * 2], dim=1),
        ],
        dim=1,
    )
    coarse = (torch.randn(batch or count, 2, ELASTIC_POINTS, ELASTIC_POINTS, generator=generator) * ELASTIC)[part]
    # Separable cubic interpolation as two small matrix products: far cheaper here than F.interpolate.
    rows, columns = _interpolation(height).to(device), _interpolation(width).to(device)
    elastic = torch.einsum("hi,ncij,wj->nhwc", rows, coarse.to(device), columns)
    grid = F.affine_grid(affine, [count, 1, height, width], align_corners=False) + elastic
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _interpolation(size: int) -> torch.Tensor:
    """The (size, ELASTIC_POINTS) matrix that interpolates coarse values to `size` points, smoothly."""
    identity = torch.eye(ELASTIC_POINTS)[None, None]
    wide = F.interpolate(identity, (size, ELASTIC_POINTS), mode="bicubic", align_corners=True)
    return wide[0, 0]
