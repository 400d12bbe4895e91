"""Weights on disk: safetensors, whole or not at all, the same bytes for the same content."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fmce_ops.errors import ModelError
from fmce_ops.files import atomic

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
        temporary.write_bytes(save(tensors, header))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The ``state_dict`` (on the CPU) and metadata of a file of :func:`save_weights`.

    Raises
    ------
    ModelError
        The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            state = {name: file.get_tensor(name) for name in names}
            header = file.metadata() or {}
        return state, json.loads(header.get(_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
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
    wanted = module.state_dict()
    misfits = sorted(
        name
        for name in wanted.keys() | state.keys()
        if name not in wanted or name not in state or wanted[name].shape != state[name].shape
    )
    if misfits:
        raise ModelError(
            f"{path} does not fit the network, {len(misfits)} of its weights differ in name or "
            f"shape ({misfits[0]!r} first): build the network with the parameters it was "
            "trained with."
        )
    module.load_state_dict(state)
    return metadata


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load weights that anyone saved: safetensors, or a ``state_dict`` that torch saved.

    Nothing in the file is executed. A dictionary may hold the weights beneath ``state_dict``,
    ``model`` or ``network``.

    Raises
    ------
    ModelError
        The file is missing or damaged, holds more than tensors and plain values, or does not fit.
    """
    if path.suffix == ".safetensors":
        load_into(module, path)
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path} cannot be read as plain weights ({type(error).__name__}): save the network's "
            "state_dict."
        ) from error
    for key in ("state_dict", "model", "network"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} does not fit the network ({str(error).splitlines()[0]}): "
            "name the network that it was saved from."
        ) from error
