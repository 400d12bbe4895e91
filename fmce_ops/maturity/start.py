"""The random start of a network: made anew, and whether a module is still at it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import exp, lgamma
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fmce_ops.errors import ModelError
from fmce_ops.maturity.modules import FunctionalModule

_SEED = 0
_DOUBT = 1e-3  # how likely a module at its start is taken for a trained one


@contextmanager
def restarted(network: nn.Module) -> Iterator[bool]:
    """While it lasts, the network has new random weights, always the same ones; then its own again.

    Every submodule that holds weights must know how to draw them (``reset_parameters``), as all of
    PyTorch's layers do; yields whether that is so, and where it is not, the network is not to be
    used. Nothing is copied but weights, so that it serves within any trainer. The state of the
    random numbers is left as it is.
    """
    holders = {m for m in network.modules() if any(True for _ in m.parameters(recurse=False))}
    able = [m for m in network.modules() if callable(getattr(m, "reset_parameters", None))]
    draws = [cast(Callable[[], object], m.reset_parameters) for m in able]  # of buffers, too
    own = [
        (module, name, tensor)
        for module in network.modules()
        for name, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    ]
    fixed = any(map(is_parametrized, network.modules())) or any(t.is_inference() for *_, t in own)
    if fixed or not holders <= set(able):
        yield False
        return
    kept = [tensor.detach().clone() for *_, tensor in own]
    try:
        yield _drawn(draws, [t for *_, t in own]) and _anew(own, kept)
    finally:
        with torch.no_grad():
            for (module, name, tensor), values in zip(own, kept, strict=True):
                tensor.copy_(values)
                if getattr(module, name) is not tensor:  # drawing put another in its place
                    setattr(module, name, tensor)


def _anew(own: Sequence[tuple[nn.Module, str, Tensor]], kept: Sequence[Tensor]) -> bool:
    """Whether all weights were drawn: not where they are made of others, as by weight_norm."""
    return not any(
        isinstance(tensor, nn.Parameter)
        and (values != values.flatten()[:1]).any()
        and torch.equal(getattr(module, name), values)
        for (module, name, tensor), values in zip(own, kept, strict=True)
    )


def _drawn(draws: Sequence[Callable[[], object]], tensors: Sequence[Tensor]) -> bool:
    """Draw new weights; False: a module wants to be told more."""
    with torch.random.fork_rng({t.device.index for t in tensors if t.is_cuda}):
        torch.manual_seed(_SEED)
        try:
            for draw in draws:
                draw()
        except TypeError:
            return False
    return True


def untrained(
    network: nn.Module, fresh: nn.Module, modules: Sequence[FunctionalModule]
) -> list[str]:
    """The modules whose weights cannot be told from those of a fresh network.

    A tensor that is constant at the start, as the scale and shift of a norm, must still be the very
    same. One that is drawn at random must look drawn from the same distribution: by Kolmogorov and
    Smirnov's test of two samples, and by how many of its numbers lie farther from 0 than all of the
    other's (Rosenbaum 1954), which training shows first where the start is uniform within bounds.
    All tests of a module together have a level of 1e-3.

    Parameters
    ----------
    fresh : the same architecture with random weights, whatever their seed.

    Returns
    -------
    Names of modules; one without weights is never among them.

    Raises
    ------
    ModelError
        ``fresh`` has other weights than ``network``.
    """
    given, start = dict(network.named_parameters()), dict(fresh.named_parameters())
    if {n: p.shape for n, p in given.items()} != {n: p.shape for n, p in start.items()}:
        raise ModelError("the fresh network has other weights: give one of the same architecture.")
    found = []
    for module in modules:
        names = list(_weights(network, module))
        level = _DOUBT / max(1, len(names))
        if names and all(_alike(given[name], start[name], level) for name in names):
            found.append(module.name)
    return found


def _weights(network: nn.Module, module: FunctionalModule) -> Iterator[str]:
    """Names of the parameters of all of its parts."""
    within = tuple(f"{part}." for part in module.parts)
    for name, _ in network.named_parameters():
        if name.startswith(within):
            yield name


def _alike(given: Tensor, start: Tensor, level: float) -> bool:
    if (start == start.flatten()[0]).all():
        return torch.equal(given.cpu(), start.cpu())
    from scipy.stats import ks_2samp  # here: it is slow to import, and a served judge needs none

    ours, theirs = (part.detach().flatten().double().cpu() for part in (given, start))
    same = float(ks_2samp(ours.numpy(), theirs.numpy(), method="asymp").pvalue)
    tests = same, _beyond(ours, theirs), _beyond(theirs, ours)
    return min(tests) > level / len(tests)


def _beyond(numbers: Tensor, others: Tensor) -> float:
    """How likely it is that so many numbers lie farther from 0 than all of as many others."""
    count = int((numbers.abs() > others.abs().max()).sum())
    n = len(numbers) + 1
    return exp(lgamma(n) - lgamma(n - count) + lgamma(2 * n - 1 - count) - lgamma(2 * n - 1))
