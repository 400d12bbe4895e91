"""Weights on disk: safetensors, whole or not at all, the same bytes for the same content."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.files import atomic

try:
    from fmce_ops.models.library import read, write
except ModuleNotFoundError:  # on a machine with torch and little else, where cells are replicated
    from fmce_ops.models.plain import read, write

_KEY = "metadata"


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a ``state_dict`` and words about it.

    Raises
    ------
    DiskError
        ``path`` could not be written.
    """
    tensors = {name: state[name].detach().cpu().contiguous().clone() for name in sorted(state)}
    # One key: safetensors writes several in an order that changes from process to process.
    header = {_KEY: json.dumps(dict(metadata), sort_keys=True)}
    with atomic(path) as temporary:
        temporary.write_bytes(write(tensors, header))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ``state_dict`` (on the CPU) and metadata of a file of :func:`save_weights`.

    Raises
    ------
    ModelError
        The file is missing or damaged.
    """
    try:
        state, header = read(path)
        return state, json.loads(header.get(_KEY, "{}"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is missing or is not a whole safetensors file: make the weights again."
        ) from error


def load_into(module: nn.Module, path: Path) -> dict[str, str]:
    """Load the weights of ``path`` into ``module``, all of them, and return their metadata.

    Raises
    ------
    ModelError
        The file is missing or damaged, or its names or shapes are not those of ``module``.
    """
    state, metadata = load_weights(path)
    _load(module, state, path)
    return metadata


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load weights that anyone saved: safetensors, or a ``state_dict`` that torch saved.

    Nothing in the file is executed. A dictionary may hold the weights beneath ``state_dict``,
    ``model_state_dict``, ``model``, ``network`` or ``net``, and wrappers such as DataParallel,
    torch.compile and Lightning may have put a name in front of all.

    Raises
    ------
    ModelError
        The file is missing or damaged, holds more than tensors and plain values, or does not fit.
    """
    if path.suffix == ".safetensors":
        _load(module, _unwrapped(load_weights(path)[0], module), path)
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be opened ({error.strerror}): give a file of weights."
        ) from error
    except Exception as error:  # torch.load says of a damaged file whatever comes to its mind
        raise ModelError(
            f"{path} cannot be read as plain weights ({type(error).__name__}): save the network's "
            "state_dict."
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "network", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(_is_weight(value) for value in state.values()):
        raise ModelError(
            f"{path} holds a {type(state).__name__} that is not one of weights alone: save the "
            "network's state_dict."
        )
    _load(module, _unwrapped(state, module), path)


def _is_weight(value: Any) -> bool:
    """Whether it is a tensor with plain numbers in it: not sparse, quantised or without values."""
    if not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def _unwrapped(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Without the names that stand in front of all, and of no weight of the module."""
    own = {str(name).partition(".")[0] for name in module.state_dict()}
    while all("." in str(name) for name in state):
        first = {str(name).partition(".")[0] for name in state}
        if len(first) != 1 or first <= own:
            break
        state = {str(name).partition(".")[2]: value for name, value in state.items()}
    return state


def _load(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a whole ``state_dict`` of ``path``; the error names the first weight that is amiss."""
    wanted = module.state_dict()
    names = dict.fromkeys([*wanted, *state])
    misfits = [
        name
        for name in names
        if _shape(state, name) != _shape(wanted, name)
        and not (name not in state and name.endswith("num_batches_tracked"))
    ]
    if misfits:
        first = misfits[0]
        raise ModelError(
            f"{path} does not fit the network, {len(misfits)} of its weights differ ({first!r} is "
            f"{_shape(state, first)} in the file and {_shape(wanted, first)} in the network): make "
            "the network as it was trained, with as many classes."
        )
    module.load_state_dict(state)


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, state[name].shape)) or "one number" if name in state else "absent"
