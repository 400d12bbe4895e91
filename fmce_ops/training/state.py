"""What a loop needs to go on: written whole or not at all, read without running anything."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from fmce_ops.errors import TrainingError
from fmce_ops.files import atomic

_DAMAGE = (  # what torch raises, by where a file is cut and by which of its bytes changed
    *(OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError),
    *(AttributeError, LookupError, TypeError),
)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values.

    Raises
    ------
    DiskError
        ``path`` could not be written.
    """
    whole = io.BytesIO()  # torch reports a full disk in ways that are hard to tell apart
    torch.save(state, whole)
    with atomic(path) as temporary:
        temporary.write_bytes(whole.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU.

    Raises
    ------
    TrainingError
        The file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise TrainingError(
            f"{path} is damaged: remove the folder {path.parent} and run the same command again."
        ) from error
    return state
