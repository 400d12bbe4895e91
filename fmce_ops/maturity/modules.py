"""The functional modules of any network, found by running it, and the feature maps they make."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError


@dataclass(frozen=True)
class FunctionalModule:
    """A part of a network that makes a feature map.

    Attributes
    ----------
    parts : names of submodules in the order in which they run: first the one that has the weights,
        then what belongs to it, a norm, an activation, a pooling. The output of the last is the
        map.
    call : which of that submodule's calls makes it, where several share the submodule.
    """

    parts: tuple[str, ...]
    call: int = 0

    @property
    def name(self) -> str:
        """Of the submodule that has the weights."""
        return self.parts[0]


@dataclass(frozen=True)
class _Map:
    """What a submodule made in one of its calls.

    Attributes
    ----------
    weighted : whether it has weights of more than one dimension: no norm, no activation.
    """

    name: str
    call: int
    shape: tuple[int, ...]
    weighted: bool


def find_modules(
    network: nn.Module, images: Tensor, names: Sequence[str] | None = None
) -> list[FunctionalModule]:
    """The functional modules of ``network`` in the order in which they run.

    The outermost submodules with weights whose output is a map; what follows one without weights
    of its own belongs to it, except the pooling that ends the maps and what comes behind that. Of
    one that runs several times the last is meant.

    Parameters
    ----------
    images : (N, 3, H, W), one image is enough.
    names : submodules to take instead, each as it is.

    Raises
    ------
    ModelError
        A name is not among the submodules that give a map, none is found, the network cannot take
        the images, or it works on tokens.
    """
    maps = _maps(network, images[:1])
    if names is not None:
        return [_named(name, maps) for name in ([names] if isinstance(names, str) else names)]
    found: list[FunctionalModule] = []
    side = 0
    for made in _outermost(maps):
        if made.weighted:
            found = [module for module in found if module.name != made.name]
            found.append(FunctionalModule((made.name,), made.call))
        elif not found or (made.shape[2:] == (1, 1) and side > 1):
            continue
        else:
            found[-1] = FunctionalModule((*found[-1].parts, made.name), made.call)
        side = max(made.shape[2:])
    if not found:
        raise ModelError(
            f"{type(network).__name__} has no submodule with weights that makes a feature map "
            "(N, C, h, w): name the modules to score."
        )
    _refuse_tokens(network, found)
    return found


def _refuse_tokens(network: nn.Module, found: Sequence[FunctionalModule]) -> None:
    """Say that a network attends outside of its maps, which would tell nothing of it."""
    within = tuple(f"{module.name}." for module in found)
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not name.startswith(within):
            raise ModelError(
                f"{type(network).__name__} works on tokens ({name}), of which the judge knows "
                "nothing: give a network whose modules make feature maps (N, C, h, w)."
            )


@torch.no_grad()
def module_maps(
    network: nn.Module, images: Tensor, modules: Sequence[FunctionalModule]
) -> list[Tensor]:
    """What each module makes of ``images`` (N, 3, H, W) in evaluation mode: (N, C, h, w) each.

    The network is in its former mode afterwards.
    """
    ends = [(module.parts[-1], module.call) for module in modules]
    made: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, call: int, output: Any) -> None:
        if (name, call) in ends and isinstance(output, Tensor):
            made[name, call] = output.clone()  # a later layer may work in place

    with _hooked(network, keep):
        network(images)
    return [made[end] for end in ends]


def _maps(network: nn.Module, images: Tensor) -> list[_Map]:
    """All feature maps that submodules make, in their order."""
    found: list[_Map] = []

    def keep(name: str, call: int, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images):
            weighted = any(w.ndim > 1 for w in network.get_submodule(name).parameters())
            found.append(_Map(name, call, tuple(output.shape), weighted))

    with torch.no_grad(), _hooked(network, keep):
        try:
            network(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the network's own code makes of them
            reason = str(error).strip().split("\n")[0]
            raise ModelError(
                f"{type(network).__name__} cannot take images {tuple(images.shape)} of "
                f"{images.dtype} ({reason}): give images of the shape that it was made for."
            ) from error
    return found


@contextmanager
def _hooked(network: nn.Module, keep: Any) -> Any:
    """Tell ``keep`` the name, the call and the output of all that runs, in evaluation mode."""

    def hook(name: str) -> Any:
        calls = count()
        return lambda module, inputs, output: keep(name, next(calls), output)

    named = [(name, module) for name, module in network.named_modules() if name]
    handles = [module.register_forward_hook(hook(name)) for name, module in named]
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _named(name: str, maps: Sequence[_Map]) -> FunctionalModule:
    calls = [made.call for made in maps if made.name == name]
    if not calls:
        known = dict.fromkeys(made.name for made in _outermost(maps))
        raise ModelError(
            f"there is no submodule {name!r} that makes a feature map: "
            f"choose among {', '.join(known) or 'those of another network'}."
        )
    return FunctionalModule((name,), calls[-1])


def _outermost(maps: Sequence[_Map], body: str = "") -> list[_Map]:
    """Those that are made within no other, seen past a submodule that makes all the rest."""
    inner = [made for made in maps if made.name.startswith(body)]
    names = {made.name for made in inner}
    top = [made for made in inner if names.isdisjoint(_holders(made.name))]
    weighted = {made.name for made in top if made.weighted}
    if len(weighted) == 1:
        prefix = f"{weighted.pop()}."
        if any(name.startswith(prefix) for name in names):
            return _outermost(maps, prefix)
    return top


def _holders(name: str) -> list[str]:
    """Names of the modules that hold a submodule."""
    return list(accumulate(name.split("."), lambda holder, part: f"{holder}.{part}"))[:-1]
