"""Gates on the filters of a network: attach and detach them, record and force them.

Interpretable neural network decoupling (arXiv 1906.01166): beside each convolution a small
controller looks at the convolution's input and says which of its filters are on.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.pathways.sites import Site, evaluating, find_sites

_OPEN = 2.0  # score of every gate at the start: 98 % of them stay open under the noise
_BATCH = 256  # images whose codes are read at a time


class Controller(nn.Module):
    """From a convolution's input to the gates of its filters (arXiv 1906.01166, section 3.2).

    In training mode a random half of the gates is hard and the others are soft, and the gradient
    is always that of the soft value (improved semantic hashing).
    """

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        hidden = max(1, channels // 4)
        self.reduce = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, filters)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, _OPEN)

    def scores(self, x: Tensor) -> Tensor:
        """(N, filters), positive where open, of the convolution's input (N, C, H, W)."""
        return self.score(self.reduce(x.mean((2, 3))).relu())

    def forward(self, x: Tensor) -> Tensor:
        """Gates (N, filters): 0 or 1 in evaluation mode, 0 to 1 in training mode."""
        scores = self.scores(x)
        if not self.training:
            return (scores > 0).to(scores.dtype)
        noisy = scores + torch.randn_like(scores)
        soft = (1.2 * noisy.sigmoid() - 0.1).clamp(0, 1)
        straight = soft + ((noisy > 0).to(soft.dtype) - soft).detach()
        hard = torch.rand_like(soft) < 0.5
        return torch.where(hard, straight, soft)


class Constant(nn.Module):
    """In a controller's place: the same gates (filters,) for every image."""

    gates: Tensor

    def __init__(self, gates: Tensor) -> None:
        super().__init__()
        self.register_buffer("gates", gates.to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, filters)."""
        return self.gates.to(x.dtype).expand(len(x), -1)


class Mask(nn.Module):
    """Multiplies a feature map (N, C, H, W) by the gates (N, C) of its channels."""

    def forward(self, features: Tensor, gates: Tensor) -> Tensor:
        return features * gates[:, :, None, None]


class Gated(nn.Module):
    """A convolution, its norm, its controller; the mask lies behind the norm.

    The activation that follows keeps zeros, so that the mask could as well lie behind it; in a
    residual block the shortcut is added later and never masked.
    """

    def __init__(self, site: Site, conv: nn.Conv2d, norm: nn.Module | None) -> None:
        super().__init__()
        self.site = site
        self.conv = conv
        self.norm = norm if norm is not None else nn.Identity()
        self.controller: Controller | Constant = Controller(conv.in_channels, conv.out_channels)
        self.mask = Mask()
        self.controller.to(conv.weight).train(conv.training)  # its device, its type and its mode

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self.norm(self.conv(x)), self.controller(x))


def attach(model: nn.Module, modules: Sequence[str] | None = None) -> nn.Module:
    """A copy of the model with a controller at each convolution, all gates open.

    Parameters
    ----------
    model : a network of convolutions, for example a ResNet, VGG or ShuffleNet V2 of torchvision.
    modules : names of the convolutions; None: all but those on a shortcut.

    Raises
    ------
    ModelError
        The model cannot be traced, has no such convolution or none at all.

    Examples
    --------
    >>> path_codes(attach(nn.Sequential(nn.Conv2d(3, 4, 1))), torch.zeros(1, 3, 2, 2))
    tensor([[True, True, True, True]])
    """
    network = copy.deepcopy(model)
    for site in find_sites(network, modules):
        conv = network.get_submodule(site.name)
        norm = network.get_submodule(site.norm) if site.norm else None
        assert isinstance(conv, nn.Conv2d)
        network.set_submodule(site.name, Gated(site, conv, norm))
        if site.norm:
            network.set_submodule(site.norm, nn.Identity())
    return network


def detach(network: nn.Module) -> nn.Module:
    """A copy without controllers: the architecture that `attach` was given, weights as now."""
    plain = copy.deepcopy(network)
    for name, gated in gated_layers(plain).items():
        plain.set_submodule(name, gated.conv)
        if gated.site.norm:
            plain.set_submodule(gated.site.norm, gated.norm)
    return plain


def held(network: nn.Module, code: Tensor) -> nn.Module:
    """A copy whose gates are ``code`` (gates,) for every image; its filters can be trained on."""
    copied = copy.deepcopy(network)
    parts = split_code(copied, code)
    for name, gated in gated_layers(copied).items():
        gated.controller = Constant(parts[name])
    return copied


def gated_layers(network: nn.Module) -> dict[str, Gated]:
    """The gated convolutions by name, as they run: so their gates follow one another in a code."""
    found = {name: part for name, part in network.named_modules() if isinstance(part, Gated)}
    return dict(sorted(found.items(), key=lambda item: item[1].site.place))


def split_code(network: nn.Module, codes: Tensor) -> dict[str, Tensor]:
    """Codes (..., gates) as one part (..., filters) for each gated convolution.

    Raises
    ------
    ModelError
        The codes are those of another network.
    """
    layers = gated_layers(network)
    filters = [gated.conv.out_channels for gated in layers.values()]
    if codes.shape[-1:] != (sum(filters),):
        raise ModelError(
            f"codes of shape {tuple(codes.shape)} do not fit a network of {sum(filters)} gates: "
            "give codes that path_codes read from it."
        )
    return dict(zip(layers, codes.split(filters, dim=-1), strict=True))


@dataclass
class Layer:
    """What a gated convolution did in one forward pass.

    Attributes
    ----------
    gates : (N, filters).
    outputs : (N, filters) spatial means of what the mask was laid over.
    """

    gates: Tensor
    outputs: Tensor


@contextmanager
def recorded(network: nn.Module) -> Iterator[dict[str, Layer]]:
    """Inside, every forward pass leaves what its gated convolutions did in the mapping."""
    record: dict[str, Layer] = {}
    with ExitStack() as stack:
        for name, gated in gated_layers(network).items():

            def keep(
                mask: nn.Module, given: tuple[Tensor, Tensor], out: Tensor, name: str = name
            ) -> None:
                record[name] = Layer(given[1], given[0].mean((2, 3)))

            stack.enter_context(gated.mask.register_forward_hook(keep))
        yield record


@contextmanager
def forced(network: nn.Module, keep: Tensor) -> Iterator[None]:
    """Inside, gates that are zero in ``keep`` (gates,) are closed for every image."""
    parts = split_code(network, keep)
    with ExitStack() as stack:
        for name, gated in gated_layers(network).items():

            def close(
                mask: nn.Module, given: tuple[Tensor, Tensor], part: Tensor = parts[name]
            ) -> tuple[Tensor, Tensor]:
                return given[0], given[1] * part.to(given[1])

            stack.enter_context(gated.mask.register_forward_pre_hook(close))
        yield


@torch.no_grad()
def path_codes(network: nn.Module, images: Tensor) -> Tensor:
    """Which gates each image opens: (N, gates) bool.

    Parameters
    ----------
    network : what `attach` returned; it is run in evaluation mode, its modules left in their own.
    images : (N, 3, H, W) as the network takes them.

    Raises
    ------
    ModelError
        The images do not fit the network, or it has no gates.
    """
    if not gated_layers(network):
        raise ModelError(f"a {type(network).__name__} has no gates: give what attach returned.")
    try:
        with evaluating(network), recorded(network) as record:
            return torch.cat([_codes(network, record, part) for part in images.split(_BATCH)])
    except (RuntimeError, IndexError, ValueError) as error:
        raise ModelError(
            f"images of shape {tuple(images.shape)} do not fit the network "
            f"({' '.join(str(error).split())}): give images as it was trained on."
        ) from error


def _codes(network: nn.Module, record: dict[str, Layer], images: Tensor) -> Tensor:
    network(images)
    return torch.cat([record[name].gates > 0 for name in gated_layers(network)], dim=1)


def most_open(codes: Tensor) -> Tensor:
    """The gates (gates,) bool that at least half of the images (N, gates) open."""
    return codes.float().mean(0) >= 0.5
