"""Pictures in files: which files are pictures, and what the network sees of one."""

import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
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
    files = sorted(path for path in folder.rglob("*") if is_picture(path.relative_to(folder)))
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
            pixels = square(opened, "L" if channels == 1 else "RGB", size)
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as a picture ({error}): give a PNG or JPEG file."
        ) from error
    return torch.from_numpy(pixels)


def is_picture(path: Path) -> bool:
    """Whether the name is that of a picture; none of its parts may be hidden."""
    shown = not any(part.startswith(".") for part in path.parts)
    return shown and path.suffix.lower() in _SUFFIXES


def square(image: Image.Image, mode: str, side: int) -> NDArray[np.uint8]:
    """The central square of an image as it was held upright: (c, side, side).

    Parameters
    ----------
    mode : PIL's ``L`` or ``RGB``.
    """
    ImageOps.exif_transpose(image, in_place=True)
    fitted = image.convert(mode)
    if fitted.size != (side, side):
        fitted = ImageOps.fit(fitted, (side, side), Image.Resampling.BILINEAR)
    values = np.array(fitted).reshape(side, side, len(mode))
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def refuse_deep(mode: str, name: str) -> None:
    """Refuse pixels that PIL would clip to 8 bits a channel."""
    if mode not in GREY | COLOUR:
        raise DataError(
            f"{name} has pixels of the kind {mode!r}: convert it to 8 bits a channel, or remove it."
        )
