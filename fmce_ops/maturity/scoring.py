"""Score the modules of a network from images alone: no labels, no loss, no head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmce_ops.maturity.descriptors import describe
from fmce_ops.maturity.judge import Judge, Score, depths, load_judge
from fmce_ops.maturity.modules import find_modules, module_maps

_AT_ONCE = 256  # images whose maps are in memory together


@torch.no_grad()
def score(
    network: nn.Module,
    images: Tensor,
    modules: Sequence[str] | None = None,
    *,
    judge: Judge | None = None,
) -> dict[str, Score]:
    """How mature the modules of a network are.

    Parameters
    ----------
    network : makes feature maps (N, C, h, w) somewhere inside; run in evaluation mode.
    images : (N, 3, H, W), as the network takes them, on any device. More images give a narrower
        interval, up to 256; of more, the mean over parts of 256 is taken.
    modules : names of submodules; None: all functional modules, first to last.
    judge : None: the one that comes with this package.

    Returns
    -------
    The score of each module by name, in the order in which they run.

    Raises
    ------
    ModelError
        A name is not that of a submodule with a feature map, or a map is not finite.
    """
    judge = judge or load_judge()
    images = images.to(next(network.parameters(), images).device)
    found = find_modules(network, images, modules)
    depth = depths(len(found)) if modules is None else _depths(network, images, modules)
    parts = [part for part in images.split(_AT_ONCE) if len(part) == min(_AT_ONCE, len(images))]
    read = []
    for part in parts:
        maps = module_maps(network, part, found)
        read.append(torch.stack([describe(maps[module.name]).cpu() for module in found]))
    scores = [judge.scores(descriptors, depth) for descriptors in read]
    return {module.name: _mean([s[i] for s in scores]) for i, module in enumerate(found)}


def next_to_train(scores: dict[str, Score]) -> str:
    """The module that is least mature; the first of several that are equally so."""
    return min(scores, key=lambda name: scores[name].value)


def _depths(network: nn.Module, images: Tensor, names: Sequence[str]) -> Tensor:
    """Of modules that the user named: where they lie among all functional modules."""
    every = [module.name for module in find_modules(network, images)]
    places = [
        next((i for i, known in enumerate(every) if _within(name, known)), len(every) - 1)
        for name in names
    ]
    return depths(len(every))[places]


def _within(name: str, known: str) -> bool:
    return name == known or name.startswith(f"{known}.")


def _mean(scores: Sequence[Score]) -> Score:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Score(
        mean([s.value for s in scores]),
        mean([s.low for s in scores]),
        mean([s.high for s in scores]),
    )
