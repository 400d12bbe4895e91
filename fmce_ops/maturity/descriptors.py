"""What is read of feature maps: as many numbers whatever the count and the order of channels.

A judge of maturity must read the maps of networks that it has never seen, so that nothing here may
depend on which channel is which, or on the size of the map. How many channels there are is told
apart from the rest: at the same loss the wider of two modules has moved less.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmce_ops.errors import ModelError

_QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_SIDE = 8  # of the map whose singular values are taken; larger maps are averaged to it
_ENERGIES = (1, 2, 4, 8, 16, 32)  # directions whose share of the variance over images is read
_CLUSTERS, _LLOYD = (2, 4, 8, 16), 8  # counts that images are grouped in, and steps of it
_MOST = 4096  # maps that are compared with each other
_AT_ONCE = 2**20  # numbers that are worked on together, so that they stay near the processor
_TINY = 1e-12
_LEAST = 1e-4  # share that remains about centres; less is said to be this
_ALONE = 4 * len(_QUANTILES) + 7
_BETWEEN = 4 * len(_QUANTILES) + 4 + len(_ENERGIES) + len(_CLUSTERS)
EACH = 2 * _ALONE  # numbers of the maps by themselves, the first; then those between maps
DESCRIPTORS = EACH + _BETWEEN + 3  # numbers that describe any count of maps
CHANNELS, COUNT, VIEWED = range(EACH + _BETWEEN, DESCRIPTORS)  # log2 of both, and whether views


def describe(maps: Tensor) -> Tensor:
    """Descriptors of 1 to 4096 maps of one module together; it compares each with each.

    Relative to each map's mean absolute value, and then as the mean and the standard deviation over
    maps: quantiles over channels of the mean, of the standard deviation, of the largest value and
    of the share of positive values; log scale, sparsity, kurtosis, roughness, and the spectrum of
    channels x positions. Between the maps, averaged over positions: the share of their energy that
    all have in common, the spectrum of the rest, the cosines, the distance to the nearest other,
    the share that remains of it about the centres of 2 to 16 groups, and over channels the kurtosis
    and the variation; zero where there is one map alone. The last are log2 C, log2 N, and 0.

    Parameters
    ----------
    maps : (N, C, h, w), or (N, C) for one position each.

    Returns
    -------
    (DESCRIPTORS,) float32, finite.

    Raises
    ------
    ModelError
        ``maps`` is not of that shape, not finite, or they are more.
    """
    maps = _checked(maps)
    if len(maps) > _MOST:
        raise ModelError(f"{len(maps)} maps are too many to compare: give {_MOST} at most.")
    return _together(maps[None], _each(maps)[None])[0]


def describe_each(maps: Tensor) -> Tensor:
    """What :func:`describe` gives for each of N maps alone: (N, DESCRIPTORS)."""
    maps = _checked(maps)
    each = _each(maps)
    rest = F.pad(each, (0, CHANNELS - each.shape[1]))
    return torch.cat([rest, _counts(each, maps.shape[1], 1)], dim=1)


def describe_views(maps: Tensor) -> Tensor:
    """What :func:`describe` gives for the views of each image; the last are log2 C, 0, and 1.

    Parameters
    ----------
    maps : (n, v, C, h, w), v >= 2 maps of each of n images.

    Returns
    -------
    (n, DESCRIPTORS)
    """
    flat = _checked(maps.flatten(0, 1))
    of_image = maps.shape[:2]
    rows = _together(flat.unflatten(0, of_image), _each(flat).unflatten(0, of_image))
    return torch.cat([rows[:, :COUNT], rows.new_tensor([0.0, 1.0]).expand(len(rows), 2)], dim=1)


def describe_bags(maps: Tensor, sizes: Sequence[int]) -> Tensor:
    """What :func:`describe` gives for the first ``sizes[0]`` maps, for the next, and so on.

    Each size starts again from the first map where the maps are used up.

    Returns
    -------
    (len(sizes), DESCRIPTORS)
    """
    maps = _checked(maps)
    each = _each(maps)
    bags: dict[int, list[Tensor]] = {size: [] for size in sizes}
    start, places = 0, torch.arange(len(maps), device=maps.device)
    for size in sizes:
        start = start if start + size <= len(maps) else 0
        bags[size].append(places[start : start + size])
        start += size
    rows = maps.new_empty(len(sizes), DESCRIPTORS)
    for size, alike in bags.items():
        chosen = torch.stack(alike)
        rows[torch.tensor(sizes, device=maps.device) == size] = _together(
            maps[chosen], each[chosen]
        )
    return rows


def _together(maps: Tensor, each: Tensor) -> Tensor:
    """Of g groups: (g, N, C, h, w) and what is read of each map (g, N, ·) -> (g, DESCRIPTORS)."""
    groups, images = maps.shape[:2]
    between = _between(maps) if images > 1 else maps.new_zeros(groups, _BETWEEN)
    last = _counts(between, maps.shape[2], images)
    return torch.cat([each.mean(1), each.std(1, correction=0), between, last], dim=1)


def _counts(rows: Tensor, channels: int, images: int) -> Tensor:
    """What ends each of n rows: (n, 3)."""
    return rows.new_tensor([math.log2(channels), math.log2(images), 0.0]).expand(len(rows), 3)


def _each(maps: Tensor) -> Tensor:
    at_once = max(1, _AT_ONCE // maps[0].numel())
    return torch.cat([_alone(part) for part in maps.split(at_once)])


def _alone(maps: Tensor) -> Tensor:
    values = maps.flatten(2)
    scale = values.abs().mean(dim=(1, 2), keepdim=True).clamp_min(_TINY)
    values = values / scale
    square = values.square()
    mean, power = values.mean(2), square.mean(2)
    spread = (power - mean.square()).clamp_min(0).sqrt()
    channels = mean, spread, values.amax(2), (values > 0).float().mean(2)
    form = square.flatten(1)
    energy = power.mean(1).clamp_min(1.0)  # no less than the square of the mean
    numbers = (
        scale.flatten().log(),
        energy.rsqrt(),  # sparsity
        (form.square().mean(1) / energy.square()).log1p(),  # kurtosis
        _roughness(values.view_as(maps), spread),
        *_spectrum(values.view_as(maps)),
    )
    quantiles = [_quantiles(_compressed(part)) for part in channels]
    return torch.cat([*quantiles, torch.stack(numbers, dim=1)], dim=1)


def _between(maps: Tensor) -> Tensor:
    """Of g groups of maps (g, N, C, h, w): (g, _BETWEEN)."""
    values = maps.flatten(3)
    values = values / values.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(_TINY)
    pooled = values.mean(3)
    power = values.square().mean(dim=(1, 3)).sum(1)
    mean = pooled.mean(1, keepdim=True)
    rest = pooled - mean
    energy = pooled.square().sum(2).mean(1).clamp_min(_TINY)
    variance = rest.square().sum(2).mean(1)
    total = (power - mean.square().sum(dim=(1, 2))).clamp_min(_TINY)
    shares = torch.stack([variance / energy, variance / total], dim=1)
    energies, places = _turned(rest)
    parts = _directions(energies), _neighbours(places), _groups(places), _selectivity(pooled)
    return torch.cat([shares, *parts], dim=1)


def _turned(rest: Tensor) -> tuple[Tensor, Tensor]:
    """Energies along the directions of (g, N, C), greatest first, and the points turned into them.

    All that lies between N points is in N directions. Where there are many more channels, it is
    found there with less work than the turn takes; elsewhere the points are left as they are.
    """
    few = rest.shape[1] < rest.shape[2]
    gram = (rest @ rest.mT if few else rest.mT @ rest).double()
    if 4 * rest.shape[1] > rest.shape[2]:
        return torch.linalg.eigvalsh(gram).clamp_min(0).flip(1).float(), rest
    energies, directions = torch.linalg.eigh(gram)
    energies = energies.clamp_min(0)
    return energies.flip(1).float(), (directions * energies.sqrt()[:, None]).float()


def _checked(maps: Tensor) -> Tensor:
    if maps.ndim not in (2, 4) or not maps.numel():
        raise ModelError(f"the feature maps have shape {tuple(maps.shape)}: give (N, C, h, w).")
    maps = maps.float()
    if not torch.isfinite(maps).all():
        raise ModelError("the feature maps hold a number that is not finite: check the weights.")
    return maps if maps.ndim == 4 else maps[:, :, None, None]


def _quantiles(values: Tensor) -> Tensor:
    """Along the last dimension, which they replace."""
    at = torch.tensor(_QUANTILES, device=values.device)
    return values.quantile(at, dim=-1).movedim(0, -1)


def _compressed(values: Tensor) -> Tensor:
    return values.sign() * values.abs().log1p()


def _roughness(maps: Tensor, spread: Tensor) -> Tensor:
    """Mean square step between neighbours over twice the variance within channels: (N,), 0 to 2."""
    steps = [
        maps.diff(dim=side).square().mean(dim=(1, 2, 3)) for side in (2, 3) if maps.shape[side] > 1
    ]
    if not steps:
        return maps.new_zeros(len(maps))
    variance = spread.square().mean(1).clamp_min(1e-6)
    return (torch.stack(steps).mean(0) / (2 * variance)).clamp_max(2.0)


def _spectrum(maps: Tensor) -> Iterator[Tensor]:
    """Of channels x positions: log mean energy, and twice how evenly directions share it: (N,).

    Evenness is read from moments of the energies, the participation ratio and the same of their
    squares, which need products alone.
    """
    if max(maps.shape[2:]) > _SIDE:
        height, width = (min(side, _SIDE) for side in maps.shape[2:])
        maps = F.adaptive_avg_pool2d(maps, (height, width))
    values = maps.flatten(2)
    if values.shape[1] < values.shape[2]:
        values = values.mT
    gram = values.mT @ values / values.shape[1]
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(_TINY)
    first = gram.square().sum(dim=(1, 2)).clamp_min(_TINY)
    second = (gram @ gram).square().sum(dim=(1, 2)).clamp_min(_TINY**2)
    directions = gram.shape[1]
    yield (trace / directions).log()
    for ratio in (trace.square() / first, first.square() / second):
        yield ratio.log() / math.log(max(directions, 2))


def _directions(energies: Tensor) -> Tensor:
    """Of a spectrum (g, ·), greatest first: log effective rank, participation, energy shares."""
    shares = energies / energies.sum(1, keepdim=True).clamp_min(_TINY)
    entropy = torch.special.entr(shares).sum(1)
    participation = -shares.square().sum(1).clamp_min(_TINY).log()
    cumulated = shares.cumsum(1)
    first = [cumulated[:, min(count, shares.shape[1]) - 1] for count in _ENERGIES]
    return torch.stack([entropy, participation, *first], dim=1)


def _neighbours(rest: Tensor) -> Tensor:
    """Quantiles of the cosines between images, and of the nearest one's share of the distance."""
    unit = F.normalize(rest, dim=2)
    others = ~torch.eye(rest.shape[1], dtype=torch.bool, device=rest.device)
    cosines = (unit @ unit.mT)[:, others]
    distances = torch.cdist(rest, rest)
    nearest = distances.masked_fill(~others, torch.inf).amin(2)
    ratio = nearest / distances[:, others].mean(1, keepdim=True).clamp_min(_TINY)
    return torch.cat([_quantiles(cosines), _quantiles(ratio)], dim=1)


def _groups(rest: Tensor) -> Tensor:
    """Log share of the squares of (g, N, C) that remains about the centres of ever more groups.

    Lloyd's steps from centres that lie farthest from each other, so that nothing is drawn.
    """
    total = rest.square().sum(dim=(1, 2)).clamp_min(_TINY)
    centres = _farthest(rest, min(max(_CLUSTERS), rest.shape[1]))
    remains = [_remains(rest, centres[:, :count]) for count in _CLUSTERS]
    return (torch.stack(remains, dim=1) / total[:, None]).clamp_min(_LEAST).log()


def _farthest(points: Tensor, count: int) -> Tensor:
    """The point farthest from 0, and then always the one farthest from those before."""
    group = torch.arange(len(points), device=points.device)
    distance, chosen = points.square().sum(2), []
    for _ in range(count):
        chosen.append(points[group, distance.argmax(1)])
        away = (points - chosen[-1][:, None]).square().sum(2)
        distance = away if len(chosen) == 1 else torch.minimum(distance, away)
    return torch.stack(chosen, dim=1)


def _remains(points: Tensor, centres: Tensor) -> Tensor:
    for _ in range(_LLOYD):
        nearest = torch.cdist(points, centres).argmin(2)
        belongs = F.one_hot(nearest, centres.shape[1]).to(points.dtype)
        counts = belongs.sum(1)[:, :, None]
        centres = torch.where(counts > 0, belongs.mT @ points / counts.clamp_min(1), centres)
    return torch.cdist(points, centres).amin(2).square().sum(1)


def _selectivity(pooled: Tensor) -> Tensor:
    """Over channels: quantiles of the log kurtosis and of the log variation over images."""
    rest = pooled - pooled.mean(1, keepdim=True)
    variance = rest.square().mean(1)
    kurtosis = rest.pow(4).mean(1) / variance.square().clamp_min(_TINY)
    size = pooled.abs().mean(1)
    variation = variance.sqrt() / size.clamp_min(_TINY)
    return torch.cat([_quantiles(kurtosis.log1p()), _quantiles(variation.log1p())], dim=1)
