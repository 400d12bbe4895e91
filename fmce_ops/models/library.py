"""Safetensors by its library."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write(tensors: dict[str, Tensor], words: dict[str, str]) -> bytes:
    """The file that holds contiguous tensors on the CPU, and words about them."""
    return save(tensors, words)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and the words about them; ValueError of a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
