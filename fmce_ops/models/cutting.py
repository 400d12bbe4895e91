"""Cut a network at a submodule: keep what computes the feature map, drop the rest."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError


def cut_at(name: str, network: nn.Module, cut: str | None, in_size: int) -> tuple[nn.Module, int]:
    """The part of ``network`` up to the output of its submodule ``cut``, and its channels.

    Most networks run their children one after another; then the part is an ``nn.Sequential`` of
    those very modules, checked against the whole network on an example in evaluation mode.
    Otherwise the part is traced. Neither keeps parameters of what follows the cut.

    Parameters
    ----------
    name
        What to call the network in a message.
    cut
        Dotted name of a submodule; None is an error that lists candidates.
    in_size
        Side in pixels of the images for which the cut must give a map (N, C, h, w).

    Raises
    ------
    ModelError
        There is no such submodule, or its output is not such a map, or it runs more than once, or
        the network cannot be cut there.
    """
    outputs, failure = _outputs(network, cut, in_size)
    others = ", ".join(_candidates(outputs))
    if cut is None or cut not in outputs:
        what = "has no cut of its own" if cut is None else f"has no submodule {cut!r} that runs"
        raise ModelError(
            f"The backbone {name!r} {what} on images of {in_size} px{failure}: "
            f"set the cut to one of {others or 'another network'}."
        )
    if len(outputs[cut]) > 1:
        raise ModelError(
            f"The cut {cut!r} of {name!r} runs {len(outputs[cut])} times for an image, so that it "
            f"does not tell where to cut: set it to one of {others or 'another network'}."
        )
    (expected,) = outputs[cut]
    if not _is_map(expected):
        raise ModelError(
            f"The cut {cut!r} of {name!r} gives {_form(expected)} instead of a map "
            f"(N, C, h, w): set it to one of {others or 'another network'}."
        )
    channels = int(expected.shape[1])
    chain = _chain(network, cut)
    if _gives(chain, expected, in_size):
        return chain, channels
    return _traced(name, network, cut), channels


def _example(in_size: int) -> Tensor:
    # Two images, so that no layer mistakes the batch for something else.
    return torch.rand(2, 3, in_size, in_size, generator=torch.Generator().manual_seed(0))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(mode)


def _outputs(network: nn.Module, cut: str | None, in_size: int) -> tuple[dict[str, list[Any]], str]:
    """What each submodule gives for the example, in each of its runs, and how the network failed.

    Of ``cut`` the values, of others the shape; submodules that never ran are not among them. Images
    of this size may be too small for what follows the cut, so that a failure may be none.
    """
    outputs: dict[str, list[Any]] = {}
    failure = ""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                # A copy, for a later layer may work in place.
                output = output.clone() if name == cut else output.to("meta")
            outputs.setdefault(name, []).append(output)

        return hook

    named = [(name, module) for name, module in network.named_modules() if name]
    handles = [module.register_forward_hook(keep(name)) for name, module in named]
    try:
        with _evaluating(network):
            network(_example(in_size))
    except Exception as error:  # whatever the network's own code makes of them
        reason = str(error).strip().split("\n")[0]
        failure = f" ({type(error).__name__}: {reason})"
    finally:
        for handle in handles:
            handle.remove()
    return outputs, failure


def _is_map(output: Any) -> bool:
    """Whether it is (N, C, h, w); of square images (N, h, w, C) betrays itself by its sides."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        return False
    _, first, second, last = output.shape
    return not first == second != last


def _form(output: Any) -> str:
    if not isinstance(output, Tensor):
        return f"a {type(output).__name__}"
    return f"({', '.join(['N', *map(str, output.shape[1:])])})"


def _candidates(outputs: dict[str, list[Any]]) -> list[str]:
    """The outermost submodules that run once and give a map."""
    maps = [name for name, (one, *more) in outputs.items() if _is_map(one) and not more]
    depth = min((name.count(".") for name in maps), default=0)
    return [name for name in maps if name.count(".") == depth]


def _chain(network: nn.Module, cut: str) -> nn.Sequential:
    """The children of ``network`` in order, up to and with ``cut``."""
    first, _, rest = cut.partition(".")
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in network.named_children():
        kept[name] = _chain(child, rest) if name == first and rest else child
        if name == first:
            break
    return nn.Sequential(kept)


def _gives(chain: nn.Module, expected: Tensor, in_size: int) -> bool:
    try:
        with _evaluating(chain):
            output = chain(_example(in_size))
    except Exception:  # modules in another order than their network calls them: anything
        return False
    return (
        isinstance(output, Tensor)
        and output.shape == expected.shape
        and bool(torch.allclose(output, expected, rtol=1e-4, atol=1e-5))
    )


class _Traced(nn.Module):
    def __init__(self, network: nn.Module, cut: str) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        self.network = create_feature_extractor(network, {cut: "map"})

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)["map"]


def _traced(name: str, network: nn.Module, cut: str) -> nn.Module:
    try:
        return _Traced(network, cut)
    except Exception as error:  # tracing runs the user's code on stand-ins: anything may happen
        raise ModelError(
            f"The backbone {name!r} cannot be cut at {cut!r}, for its layers are not a chain and "
            "it cannot be traced: return from the factory a network of chained modules."
        ) from error
