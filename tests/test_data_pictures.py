"""Pictures that a user points to: read as they are, or refused with a sentence."""

from pathlib import Path

import numpy as np
import pytest
from fmce_ops.data import read_picture
from fmce_ops.errors import DataError
from PIL import Image


def test_the_central_square_of_a_picture(tmp_path: Path) -> None:
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for channels in (1, 3):
        read = read_picture(tmp_path / "wide.png", 4, channels)
        assert read.shape == (channels, 4, 4)
        assert (read == 255).all()


def test_more_than_eight_bits_are_refused_and_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000).save(path)
    with pytest.raises(DataError, match=r"deep\.png has pixels of the kind 'I;16'"):
        read_picture(path, 4)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"P6\n4 64\n\xc255\n" + bytes(64), b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.ppm"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.ppm cannot be read as a picture"):
        read_picture(path, 4)
