"""Pictures that are no data set: one file, or a folder without labels."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fmce_ops.data.seeds import generator
from fmce_ops.errors import DataError

GREY = {"1", "L"}  # PIL's modes of 8 bits a channel
COLOUR = {"RGB", "RGBA", "RGBX", "P", "PA", "LA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
UNREADABLE = (  # what PIL raises for files that are damaged or no pictures
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def read_pictures(folder: Path, size: int, count: int) -> Tensor:
    """Up to ``count`` pictures of a folder and its folders, drawn at random.

    Returns
    -------
    uint8 (n, 3, size, size): each picture's central square.

    Raises
    ------
    DataError
        There are none, or one cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no pictures: give a folder with PNG or JPEG files.")
    order = torch.randperm(len(files), generator=generator(0))[:count].tolist()
    return torch.stack([read_picture(files[i], size) for i in sorted(order)])


def read_picture(path: Path, size: int, channels: int = 3) -> Tensor:
    """The central square of a picture: uint8 (channels, size, size), grey where it is one.

    Raises
    ------
    DataError
        The file is no picture, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as opened:
            refuse_deep(opened.mode, str(path))
            form = "L" if channels == 1 else "RGB"
            picture = ImageOps.fit(opened.convert(form), (size, size))
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as a picture ({error}): give a PNG or JPEG file."
        ) from error
    return torch.from_numpy(np.array(picture).reshape(size, size, channels)).permute(2, 0, 1)


def refuse_deep(mode: str, name: str) -> None:
    """Refuse pixels that PIL would clip to 8 bits a channel."""
    if mode not in GREY | COLOUR:
        raise DataError(
            f"{name} has pixels of the kind {mode!r}: convert it to 8 bits a channel, or remove it."
        )
