"""A module at a point: its value and the products of its Jacobian with vectors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fmce_ops.errors import ReverseError

Map = Callable[[Tensor], Tensor]

# Activations that are flat beyond these bounds: a unit that rests there has no derivative, though
# a larger input would wake it.
_FLAT: dict[Callable[..., Any], tuple[float, float]] = {
    F.relu: (0.0, torch.inf),
    torch.relu: (0.0, torch.inf),
    F.relu6: (0.0, 6.0),
    F.hardswish: (-3.0, torch.inf),
    F.hardsigmoid: (-3.0, 3.0),
}


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients for parameters, nothing in place; all as before afterwards."""
    training = [(part, part.training) for part in module.modules()]
    inplace = [part for part in module.modules() if getattr(part, "inplace", False) is True]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.eval().requires_grad_(False)
        _set_inplace(inplace, False)
        yield
    finally:
        for part, mode in training:
            part.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)
        _set_inplace(inplace, True)


def _set_inplace(parts: list[nn.Module], value: bool) -> None:
    for part in parts:
        part.inplace = value  # type: ignore[assignment]


class Linearised:
    """The Jacobian J of ``module`` at x: (n, ...) -> (n, ...), one block per sample.

    ``pull`` is one backward pass. ``push`` is the derivative of ``pull``, which is linear: one more
    backward pass on a graph that is built once, and cheaper than forward mode, which repeats the
    module for every vector. Forward mode steps in where an operation has no second derivative.

    Parameters
    ----------
    module : maps one tensor to one tensor, sample by sample.
    leak : slope that a unit gets which rests in the flat part of its activation; 0 is the truth.

    Attributes
    ----------
    value : (n, ...) module(x).
    floor : 0 where the module's last operation is a ReLU, else -inf.
    """

    def __init__(self, module: nn.Module, x: Tensor, leak: float = 0.0) -> None:
        self._module, self._leak = module, leak
        self._x = x.detach().clone().requires_grad_()
        self._seed: Tensor | None = None
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Surrogate(leak) as surrogate:
            self._y = module(self._x.clone())  # its first operation may be in place
        self.floor = 0.0 if surrogate.last is self._y else -torch.inf
        self.value = self._y.detach()
        if not self._y.requires_grad:
            raise ReverseError(
                f"{type(module).__name__} returned a tensor that no gradient comes back from: "
                "only differentiable modules can be reversed."
            )

    def take(self, rows: Tensor) -> "Linearised":
        """The same for some of the samples."""
        return Linearised(self._module, self._x[rows], self._leak)

    def pull(self, u: Tensor) -> Tensor:
        """J^T u: (n, ...) of the output -> (n, ...) of the input."""
        return _gradient(self._y, self._x, u)

    def push(self, v: Tensor) -> Tensor:
        """J v: (n, ...) of the input -> (n, ...) of the output."""
        if self._seed is None:
            self._seed = torch.zeros_like(self.value, requires_grad=True)
            self._pulled = _gradient(self._y, self._x, self._seed, create_graph=True)
        with suppress(RuntimeError):
            return _gradient(self._pulled, self._seed, v)
        return self._forward_mode(v)

    def _forward_mode(self, v: Tensor) -> Tensor:
        surrogate = _Surrogate(self._leak)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), surrogate:
            dual = self._module(forward_ad.make_dual(self._x.detach(), v))
            tangent = forward_ad.unpack_dual(dual).tangent
        return torch.zeros_like(self.value) if tangent is None else tangent


def _gradient(y: Tensor, x: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
    found = torch.autograd.grad(
        y, x, u, retain_graph=True, create_graph=create_graph, allow_unused=True
    )[0]
    return torch.zeros_like(x) if found is None else found


class _Surrogate(TorchFunctionMode):
    """Same values, other derivatives: flat activations leak, batch norm is one multiplication."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        self._leak = leak
        self.last: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _FLAT and not given.get("inplace"):
            y = _Leaky.apply(args[0], func, self._leak) if self._leak else func(*args, **given)
            self.last = y if _FLAT[func] == _FLAT[F.relu] else None
            return y
        if func is F.batch_norm and not given.get("training"):
            return _batch_norm(*args, **given)
        return func(*args, **given)


class _Leaky(torch.autograd.Function):
    """A flat activation whose resting units pass ``leak`` of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Map, leak: float) -> Tensor:
        low, high = _FLAT[function]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            (slope,) = torch.autograd.grad(y.sum(), leaf)
        ctx.slope = slope.masked_fill_((x <= low) | (x >= high), leak)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.slope, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent * ctx.slope


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    scale = (variance + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    channels = (1, -1) + (1,) * (x.ndim - 2)
    return x * scale.view(channels) + shift.view(channels)
