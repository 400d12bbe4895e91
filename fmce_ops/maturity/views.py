"""Altered copies of an image: what a network makes of them tells more than one map can."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = 32  # of each image, itself among them
_TURN, _SHIFT, _ZOOM = 0.4, 0.5, 0.35  # radians; half sides; log scale
_CONTRAST, _NOISE = 0.4, 0.3  # log scale; standard deviations
_SEED = 0


def views(images: Tensor) -> Tensor:
    """Each image, and copies that are turned, shifted, zoomed, mirrored, noisy, of other contrast.

    All images are altered alike, and always in the same ways.

    Parameters
    ----------
    images : (n, c, H, W), normalised.

    Returns
    -------
    (n, VIEWS, c, H, W)
    """
    _, channels, height, width = images.shape
    places, contrast, noise = _changes(channels, height, width)
    seen = [
        contrast[k] * F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        + noise[k].to(images)
        for k, grid in enumerate(_grids(places, images))
    ]
    return torch.stack([images, *seen], dim=1)


def _grids(places: Tensor, images: Tensor) -> list[Tensor]:
    shape = list(images.shape)
    return [
        F.affine_grid(place.expand(len(images), 2, 3), shape, align_corners=False).to(images)
        for place in places
    ]


@lru_cache(maxsize=4)
def _changes(channels: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the copies: (n, 2, 3) where they look, (n,) contrast and (n, c, H, W) noise."""
    count = VIEWS - 1
    generator = torch.Generator().manual_seed(_SEED)
    turn, zoom, across, down, contrast = 2 * torch.rand(5, count, generator=generator) - 1
    mirrored, loudness = torch.rand(2, count, generator=generator)
    turn, zoom = turn * _TURN, (zoom * _ZOOM).exp()
    side = (mirrored < 0.5).float() * 2 - 1
    first = torch.stack([zoom * turn.cos() * side, -zoom * turn.sin(), across * _SHIFT], dim=1)
    second = torch.stack([zoom * turn.sin() * side, zoom * turn.cos(), down * _SHIFT], dim=1)
    drawn = torch.randn(count, channels, height, width, generator=generator)
    noise = _NOISE * loudness[:, None, None, None] * drawn
    return torch.stack([first, second], dim=1), (contrast * _CONTRAST).exp(), noise
