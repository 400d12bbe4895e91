"""From uint8 images to batches of a network; every batch can be made on its own, in any order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fmce_ops.data.seeds import generator
from fmce_ops.errors import ParamsError


@dataclass(frozen=True)
class Augment:
    """Random changes of the training images.

    Attributes
    ----------
    pad
        Black pixels added on each side, at network size, before a random crop; 0 for no crop.
    flip
        Whether half of the images are mirrored left to right.
    """

    pad: int = 0
    flip: bool = False


def to_input(
    images: Tensor,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    channels_last: bool = True,
) -> Tensor:
    """What a network takes: resized, normalised, three channels.

    Parameters
    ----------
    images
        uint8 (n, c, s, s) with c of 1 or 3, on any device.
    size
        Side of the result in pixels; bilinear, smoothed first only where it shrinks.
    mean, std
        c values each, pixels taken as 0..1.

    Returns
    -------
    Tensor
        float32 (n, 3, size, size) on the device of ``images``.
    """
    return _normalise(_resize(images, size), mean, std, channels_last)


def _resize(images: Tensor, size: int) -> Tensor:
    """(n, c, size, size), 0..255: the images themselves where they fit, else float32."""
    side = images.shape[-1]
    if side == size:
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=size < side)


def _normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool
) -> Tensor:
    n, _, height, width = images.shape
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    both = _sent(torch.stack([scale, shift])[..., None, None], images.device)
    normal = torch.addcmul(both[1], images.float(), both[0])
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return normal.expand(n, 3, height, width).contiguous(memory_format=memory)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on ``device``; nobody waits for what a GPU has still to compute."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def augment(images: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """Crop and mirror each image (n, c, s, s) of any type at random; the shape stays.

    ``generator`` is of the CPU whatever the device of ``images``, so that a seed means the same
    everywhere.
    """
    return _apply(images, settings.pad, _draw(len(images), settings, generator))


def _draw(n: int, settings: Augment, generator: torch.Generator) -> Tensor:
    """For each image the top and left of its crop and whether it is mirrored: int64 (n, 3)."""
    corners = torch.randint(0, 2 * settings.pad + 1, (n, 2), generator=generator)
    mirrored = torch.randint(0, 2 if settings.flip else 1, (n, 1), generator=generator)
    return torch.cat([corners, mirrored], dim=1)


def _apply(images: Tensor, pad: int, draws: Tensor) -> Tensor:
    side = images.shape[-1]
    top, left, mirrored = _sent(draws, images.device).unbind(1)
    if pad:
        # Every possible crop as a view (n, c, tops, lefts, s, s); indexing copies one per image.
        crops = F.pad(images, (pad,) * 4).unfold(2, side, 1).unfold(3, side, 1)
        images = crops[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n images in an epoch: a permutation int64 (n,) of (seed, epoch) alone."""
    return torch.randperm(n, generator=generator(seed, epoch))


class TrainBatches:
    """Augmented batches of a training split, each computed from (seed, epoch, step) alone.

    A killed run that repeats a step sees the same batch. With several processes, each takes its
    slice of the same global batch, images and augmentation alike.

    Parameters
    ----------
    images, labels
        uint8 (n, c, s, s) and int64 (n,). Batches are made where the labels are; images that do
        not fit there may lie elsewhere, mapped from the disk for example.
    batch_size
        Images of a step over all processes together. The images that do not fill a last batch
        are left out of the epoch; each epoch leaves out others. Data smaller than a batch makes
        one batch of all of it (less at most ``world - 1`` images, so that all slices are equal).
    size
        Side of the network's input.
    mean, std
        Channel statistics, as in :func:`to_input`.
    rows
        int64 (m,), the images to learn from; None for all of them.
    rank, world
        This process and the number of processes.

    Raises
    ------
    ParamsError
        ``batch_size`` cannot be shared evenly, or there are fewer images than processes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment,
        seed: int,
        rows: Tensor | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows = torch.arange(len(labels)) if rows is None else rows
        n = len(self._rows)
        _check_sharing(n, batch_size, world)
        self._images, self._labels = images, labels
        self._size, self._mean, self._std = size, mean, std
        self._augment, self._seed = augment, seed
        self._global = min(batch_size, n // world * world)
        share = self._global // world
        self._mine = slice(rank * share, (rank + 1) * share)
        self.steps = n // self._global

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """This process's images float32 (b, 3, size, size), channels last, and labels (b,)."""
        order = _recent_order(len(self._rows), self._seed, epoch)
        chosen = self._rows[order[step * self._global : (step + 1) * self._global][self._mine]]
        device = self._labels.device
        images = _sent(self._images[_sent(chosen, self._images.device)], device)
        draws = _draw(self._global, self._augment, generator(self._seed, epoch, step))
        resized = _resize(images, self._size)
        changed = _apply(resized, self._augment.pad, draws[self._mine])
        labels = self._labels[_sent(chosen, device)]
        return _normalise(changed, self._mean, self._std, True), labels


@lru_cache(maxsize=1)
def _recent_order(n: int, seed: int, epoch: int) -> Tensor:
    return epoch_order(n, seed, epoch)


def _check_sharing(n: int, batch_size: int, world: int) -> None:
    if batch_size < 1 or batch_size % world:
        raise ParamsError(
            f"A batch of {batch_size} images cannot be shared evenly by {world} processes: "
            f"choose a multiple of {world}."
        )
    if n < world:
        raise ParamsError(f"{n} training images are too few for {world} processes: use fewer.")
