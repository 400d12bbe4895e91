"""The functional modules of any network, found by running it, and the feature maps they make."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError


@dataclass(frozen=True)
class FunctionalModule:
    """A part of a network that makes a feature map.

    Attributes
    ----------
    name : of the submodule that has the weights.
    end : of the submodule behind it whose output is the map: a norm, an activation, a pooling.
    """

    name: str
    end: str


@dataclass(frozen=True)
class _Output:
    name: str
    shape: tuple[int, ...]
    weighted: bool  # whether it has weights of more than one dimension: no norm, no activation


def find_modules(
    network: nn.Module, images: Tensor, names: Sequence[str] | None = None
) -> list[FunctionalModule]:
    """The functional modules of ``network`` in the order in which they run.

    The outermost submodules with weights whose output is a map; what follows one without weights
    of its own belongs to it, except the pooling that ends the maps.

    Parameters
    ----------
    images : (N, 3, H, W), one image is enough.
    names : submodules to take instead, each as it is.

    Raises
    ------
    ModelError
        A name is not among the submodules that give a map, none is found, or the network works on
        tokens.
    """
    outputs = _outputs(network, images[:1])
    if names is not None:
        return [_named(name, outputs) for name in names]
    found: list[FunctionalModule] = []
    side = 0
    for output in _outermost(outputs):
        pooled = output.shape[2:] == (1, 1) and side > 1
        if output.weighted:
            found.append(FunctionalModule(output.name, output.name))
        elif found and not pooled:
            found[-1] = FunctionalModule(found[-1].name, output.name)
        side = max(output.shape[2:])
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
    ends = {module.end for module in modules}
    made: dict[str, Tensor] = {}

    def keep(end: str, output: Any) -> None:
        if end in ends and isinstance(output, Tensor):
            made[end] = output.clone()  # a later layer may work in place

    with _hooked(network, keep):
        network(images)
    return [made[module.end] for module in modules]


def _outputs(network: nn.Module, images: Tensor) -> dict[str, _Output]:
    found: dict[str, _Output] = {}

    def keep(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images):
            weighted = any(w.ndim > 1 for w in network.get_submodule(name).parameters())
            found[name] = _Output(name, tuple(output.shape), weighted)

    with torch.no_grad(), _hooked(network, keep):
        network(images)
    return found


@contextmanager
def _hooked(network: nn.Module, keep: Any) -> Any:
    """Tell ``keep`` the name and the output of every submodule that runs, in evaluation mode."""

    def hook(name: str) -> Any:
        return lambda module, inputs, output: keep(name, output)

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


def _named(name: str, outputs: dict[str, _Output]) -> FunctionalModule:
    if name not in outputs:
        known = [output.name for output in _outermost(outputs)]
        raise ModelError(
            f"there is no submodule {name!r} that makes a feature map: "
            f"choose among {', '.join(known) or 'those of another network'}."
        )
    return FunctionalModule(name, name)


def _outermost(outputs: dict[str, _Output]) -> list[_Output]:
    """Those that lie in no other, seen past containers that hold all the rest."""
    prefix = ""
    while True:
        inner = [output for name, output in outputs.items() if name.startswith(prefix)]
        depth = min((output.name.count(".") for output in inner), default=0)
        top = [output for output in inner if output.name.count(".") == depth]
        weighted = [output for output in top if output.weighted]
        if len(weighted) != 1 or len(inner) == len(top):
            return top
        (body,) = weighted
        if not any(name.startswith(f"{body.name}.") for name in outputs):
            return top
        prefix = f"{body.name}."
