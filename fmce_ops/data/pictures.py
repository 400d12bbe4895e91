"""Pictures that are no data set: one file, or a folder without labels."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fmce_ops.data.seeds import generator
from fmce_ops.errors import DataError

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
        The file is no picture.
    """
    try:
        with Image.open(path) as opened:
            form = "L" if channels == 1 else "RGB"
            picture = ImageOps.fit(opened.convert(form), (size, size))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as a picture ({error}): give a PNG or JPEG file."
        ) from error
    return torch.from_numpy(np.array(picture).reshape(size, size, channels)).permute(2, 0, 1)
