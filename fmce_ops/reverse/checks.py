"""What cannot be reversed is refused with one sentence."""

import sys
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fmce_ops.errors import ReverseError

_TYPES = (torch.float32, torch.float64)
_MOST = 10**9  # iterations
_APART = 1e-2  # part of an output that rounding may change in a batch of another size


def check_settings(damping: float, max_iterations: int, tolerance: float, bound: float) -> None:
    """Refuse settings that are no numbers, or out of range."""
    numbers = {"damping": damping, "tolerance": tolerance, "max_change": bound}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ReverseError(f"{name} is {value!r}: give a number.")
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, Integral):
        raise ReverseError(f"max_iterations is {max_iterations!r}: give a whole number.")
    if not 0 <= damping <= sys.float_info.max:
        raise ReverseError(f"damping is {damping}: give a finite number that is not negative.")
    if not 1 <= max_iterations <= _MOST:
        raise ReverseError(f"max_iterations is {max_iterations}: give 1 to {_MOST:,}.")
    if not 0 < tolerance < 1:
        raise ReverseError(f"tolerance is {tolerance}: give a relative residual in (0, 1).")
    if not 0 < bound <= sys.float_info.max:
        raise ReverseError(f"max_change is {bound}: give a finite number above 0.")


def check_tensors(module: nn.Module, target: Tensor, x0: Tensor) -> None:
    """Refuse what does not fit before anything is computed."""
    name = type(module).__name__
    for what, tensor in (("input", x0), ("target", target)):
        if not is_plain(tensor) or tensor.ndim < 2 or tensor.dtype not in _TYPES:
            raise ReverseError(
                f"the {what} of {name} is {described(tensor)}: give a dense tensor (N, ...) of "
                "float32 or float64."
            )
        if 0 in tensor.shape[1:]:
            raise ReverseError(
                f"the {what} of {name} is {tuple(tensor.shape)}, samples of nothing: give some."
            )
        if not tensor.isfinite().all():
            raise ReverseError(f"the {what} of {name} holds NaN or Inf: find out what made it.")
    if (len(target), target.dtype, target.device) != (len(x0), x0.dtype, x0.device):
        raise ReverseError(
            f"{name} got {len(x0)} inputs of {x0.dtype} on {x0.device} and {len(target)} targets "
            f"of {target.dtype} on {target.device}: give as many of the same type in one place."
        )


def is_plain(tensor: object) -> bool:
    """Whether it is a dense tensor with numbers in it."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def described(value: object) -> str:
    """What was given instead of a tensor that would do."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    words = f"{tuple(value.shape)} of {value.dtype}"
    return words if is_plain(value) else f"{words}, {value.layout} on {value.device}"


def check_module(module: nn.Module, x0: Tensor) -> None:
    """Refuse what ties the samples of a batch to one another, and weights that are not finite."""
    if not isinstance(module, nn.Module):
        raise ReverseError(f"a {type(module).__name__} is not a module: wrap it in an nn.Module.")
    if "_parameters" not in vars(module):
        raise ReverseError(
            f"{type(module).__name__} was made without its base: call super().__init__() first."
        )
    _check_batched(module, x0)
    _check_weights(module)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            raise ReverseError(
                f"{type(module).__name__} holds a {type(part).__name__} that normalises by the "
                "statistics of the batch, which ties its samples together: track running ones."
            )


def _check_batched(module: nn.Module, x0: Tensor) -> None:
    """A convolution takes (C, ...) without a batch too, and would take channels for samples."""
    first = module
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if isinstance(first, nn.modules.conv._ConvNd) and x0.ndim != len(first.kernel_size) + 2:
        raise ReverseError(
            f"the input of {type(first).__name__} is {tuple(x0.shape)}, {x0.ndim} dimensions and "
            f"not {len(first.kernel_size) + 2}: give (N, C, ...), a batch of samples."
        )


def _check_weights(module: nn.Module) -> None:
    tensors: Iterable[tuple[str, Tensor]] = chain(module.named_parameters(), module.named_buffers())
    for place, value in tensors:
        if lacking := _lacking(value):
            raise ReverseError(f"{type(module).__name__} holds {place} {lacking}.")
        # A mask of attention holds -Inf, and it is a buffer.
        strict = isinstance(value, nn.Parameter) or value.is_complex()
        try:
            good = value.isfinite() if strict else value < torch.inf
        except NotImplementedError:  # sparse, or of 8 bits
            continue
        if not good.all():
            raise ReverseError(
                f"{type(module).__name__} holds NaN or Inf in {place}: find out what made it."
            )


def _lacking(value: Tensor) -> str:
    """Why nothing can be computed with a parameter or buffer, and what to do; nothing if it can."""
    if is_lazy(value):
        return "without a shape: run the module on an input first"
    if value.is_meta:
        return "on the meta device, which has no numbers: load its weights"
    if value.is_inference():
        return "made in inference mode, which has no derivatives: make the module outside of it"
    return ""


def made(module: nn.Module, x0: Tensor, target: Tensor, what: str = "the target") -> Tensor:
    """What the module makes of x0, refused if it is not one tensor of floats of target's shape."""
    try:
        y = module(x0.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the module's own code makes of it
        name, given = culprit(module, x0)
        raise ReverseError(
            f"{name} cannot take an input {tuple(given.shape)} of {given.dtype}: give inputs of "
            f"its shape and type, or wrap it to take one tensor ({first_line(error)})."
        ) from error
    check_kind(module, x0, y)
    if y.shape != target.shape:
        raise ReverseError(
            f"{type(module).__name__} returned {tuple(y.shape)} and {what} is "
            f"{tuple(target.shape)}: give one of the output's shape."
        )
    return y


def check_kind(module: nn.Module, x0: Tensor, y: object) -> None:
    """Refuse what is not one tensor of floats with as many samples as x0."""
    if not isinstance(y, Tensor):
        name, _ = culprit(module, x0)
        raise ReverseError(
            f"{name} returned a {type(y).__name__}: only modules that map one tensor to one tensor "
            "can be reversed, so wrap it."
        )
    if not y.is_floating_point():
        name, _ = culprit(module, x0, Tensor.is_floating_point)
        raise ReverseError(
            f"{name} returned {y.dtype}: only modules whose output is of floats can be reversed."
        )
    if y.ndim < 1 or len(y) != len(x0):
        name, _ = culprit(module, x0, lambda made: made.shape[:1] == x0.shape[:1])
        count = len(y) if y.ndim else "no"
        raise ReverseError(
            f"{name} made {count} samples of {len(x0)}: a module that changes the number "
            "of samples cannot be reversed."
        )


def culprit(
    module: nn.Module, x0: Tensor, sound: Callable[[Tensor], bool] = lambda _: True
) -> tuple[str, Tensor]:
    """The first part of a Sequential whose output is no sound tensor, by type and place; its input.

    Of another module, or where the parts by themselves are sound, the module and x0.
    """
    part, place, x = module, list[str](), x0
    while isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
        for name, child in zip(part._modules, part, strict=True):
            y = _tried(child, x)
            if not (isinstance(y, Tensor) and sound(y)):
                part, place = child, [*place, name]
                break
            x = y
        else:
            break
    kind = type(part).__name__
    if not place:
        return kind, x0
    return f"{kind} (part {'.'.join(place)} of {type(module).__name__})", x


def _tried(module: nn.Module, x: Tensor) -> object:
    try:
        return module(x.clone())
    except Exception as error:
        return error


def check_apart(module: nn.Module, x0: Tensor, y: Tensor) -> None:
    """Refuse a module that makes of a sample by itself something else than in the batch, or again.

    Parameters
    ----------
    x0, y : (n, ...) and (n, ...), what the module makes of it.
    """
    _check_alone(module, x0[:1], y[:1], len(x0))
    if len(x0) > 1:  # what reads the samples before its own leaves the first as it is
        _check_alone(module, x0[-1:], y[-1:], len(x0))


def _check_alone(module: nn.Module, x: Tensor, y: Tensor, count: int) -> None:
    name = type(module).__name__
    try:
        alone = module(x.clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the module's own code makes of it
        raise ReverseError(
            f"{name} takes {count} samples together and none by itself ({first_line(error)}): only "
            "modules that take each by itself can be reversed."
        ) from error
    same = isinstance(alone, Tensor) and alone.shape == y.shape
    if not same or (alone - y).norm() > _APART * y.norm():
        raise ReverseError(
            f"{name} makes of a sample by itself something else than in a batch of {count}: only "
            "modules that take each by itself, and always alike, can be reversed."
        )


def first_line(error: Exception) -> str:
    """What an error says, or where that is nothing but a name, its type too."""
    said = str(error).strip().split("\n")[0]
    return said if " " in said else f"{type(error).__name__} {said}".strip()
