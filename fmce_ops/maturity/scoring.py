"""Score the modules of a network from images alone: no labels, no loss, no head."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from fmce_ops.maturity.descriptors import describe
from fmce_ops.maturity.judge import Judge, Score, beside, depths, load_judge
from fmce_ops.maturity.modules import FunctionalModule, find_modules, module_maps

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
    every = find_modules(network, images)
    found = every if modules is None else find_modules(network, images, modules)
    depth = depths(len(every))[[_place(module.name, every) for module in found]]
    parts = [part for part in images.split(_AT_ONCE) if len(part) == min(_AT_ONCE, len(images))]
    scores = [judge.scores(_read(network, part, every, found), depth) for part in parts]
    return {module.name: _mean([s[i] for s in scores]) for i, module in enumerate(found)}


def _read(
    network: nn.Module,
    images: Tensor,
    every: Sequence[FunctionalModule],
    found: Sequence[FunctionalModule],
) -> Tensor:
    """Rows of the modules that were found, beside every module of the network."""
    wanted = list(dict.fromkeys([*every, *found]))
    maps = module_maps(network, images, wanted)
    known = {module: describe(made).cpu() for module, made in zip(wanted, maps, strict=True)}
    modules = torch.stack([known[module] for module in every])
    return beside(torch.stack([known[module] for module in found]), modules)


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


def _mean(scores: Sequence[Score]) -> Score:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Score(
        mean([s.value for s in scores]),
        mean([s.low for s in scores]),
        mean([s.high for s in scores]),
    )
