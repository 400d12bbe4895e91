"""Score the modules of a network from images alone: no labels, no loss, no head."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.maturity.descriptors import DESCRIPTORS, describe, describe_views
from fmce_ops.maturity.judge import FEW, Judge, Score, depths, load_judge, reading
from fmce_ops.maturity.modules import FunctionalModule, find_modules, module_maps
from fmce_ops.maturity.start import restarted
from fmce_ops.maturity.views import VIEWS, views

_AT_ONCE = 256  # images whose maps are in memory together


@torch.no_grad()
def score(
    network: nn.Module,
    images: Tensor,
    modules: Sequence[str] | None = None,
    *,
    judge: Judge | None = None,
    start: Tensor | None = None,
) -> dict[str, Score]:
    """How mature the modules of a network are; call it between steps of training.

    Parameters
    ----------
    network : makes feature maps (N, C, h, w) somewhere inside; run in evaluation mode.
    images : (N, C, H, W), as the network takes them, on any device. More images give a narrower
        interval, up to 256; of more, the mean over whole parts of 256 is taken, and what is left
        over is not read. Fewer than 16 are shown to the network altered, too.
    modules : names of submodules; None: all functional modules, first to last.
    judge : None: the one that comes with this package.
    start : what :func:`start_of` gives for these modules and images, where it is known already.

    Returns
    -------
    The score of each module by name, in the order in which they run.

    Raises
    ------
    ModelError
        A name is not that of a submodule with a feature map, a map is not finite, there are no
        images or none that the network can take, or it works on tokens.
    """
    if not len(images):
        raise ModelError("there are no images to score with: give at least one.")
    judge = judge or load_judge()
    network, images = _ready(network, images)
    every, found, wanted = _modules(network, images, modules)
    start = start_of(network, images, modules) if start is None else start
    places = [wanted.index(module) for module in found]
    depth = depths(len(every))[[_place(module.name, every) for module in found]]
    scores = []
    for part in bags(images):
        own = _read(network, part, wanted)
        rows = reading(own[places], start=start[places], network=own[: len(every)])
        scores.append(judge.scores(rows, depth))
    return {module.name: mean_score([s[i] for s in scores]) for i, module in enumerate(found)}


@torch.no_grad()
def start_of(network: nn.Module, images: Tensor, modules: Sequence[str] | None = None) -> Tensor:
    """What is read of the network's modules with random weights, the same at each call.

    For those who score a network again and again with the same images.

    Returns
    -------
    (M, DESCRIPTORS)
        Of all functional modules, and of those named that are not among them; NaN where the
        network cannot be made anew.
    """
    network, images = _ready(network, images)
    *_, wanted = _modules(network, images, modules)
    with restarted(network) as possible:
        if possible:
            return _read(network, bags(images)[0], wanted)
    return torch.full((len(wanted), DESCRIPTORS), torch.nan)


def _ready(network: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """The network behind `torch.compile`, and the images where and as its weights are."""
    weights = (parameter for parameter in network.parameters() if parameter.is_floating_point())
    return getattr(network, "_orig_mod", network), images.to(next(weights, images))


def _modules(
    network: nn.Module, images: Tensor, names: Sequence[str] | None
) -> tuple[list[FunctionalModule], ...]:
    """All functional modules, those named, and both, each once."""
    every = find_modules(network, images)
    found = every if names is None else find_modules(network, images, names)
    return every, found, list(dict.fromkeys([*every, *found]))


def bags(images: Tensor) -> list[Tensor]:
    """Images, or maps of them, that are judged together: equally many in each, 256 at most."""
    return [part for part in images.split(_AT_ONCE) if len(part) == min(_AT_ONCE, len(images))]


def _read(network: nn.Module, images: Tensor, modules: Sequence[FunctionalModule]) -> Tensor:
    """Descriptors of the maps of each module: (M, DESCRIPTORS)."""
    if len(images) >= FEW:
        return torch.stack([describe(made).cpu() for made in module_maps(network, images, modules)])
    rows = []
    for seen in views(images).split(_AT_ONCE // VIEWS):
        maps = module_maps(network, seen.flatten(0, 1), modules)
        rows.append(
            torch.stack([describe_views(made.unflatten(0, seen.shape[:2])).cpu() for made in maps])
        )
    return torch.cat(rows, dim=1).mean(1)


def next_to_train(scores: dict[str, Score], untrained: Collection[str] = ()) -> str:
    """The module that is least mature; the first of several that are equally so.

    Where modules are known to be untrained, it is one of them.
    """
    candidates = [name for name in scores if name in untrained] or list(scores)
    return min(candidates, key=lambda name: scores[name].value)


def _place(name: str, every: Sequence[FunctionalModule]) -> int:
    """Where a module lies among all functional modules."""
    places = (i for i, known in enumerate(every) if _within(name, known.name))
    return next(places, len(every) - 1)


def _within(name: str, known: str) -> bool:
    return name == known or name.startswith(f"{known}.")


def mean_score(scores: Sequence[Score]) -> Score:
    """Of bags of images."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Score(
        mean([s.value for s in scores]),
        mean([s.low for s in scores]),
        mean([s.high for s in scores]),
    )
