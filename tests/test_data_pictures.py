"""Pictures that a user points to: read as they are, or refused with a sentence."""

from pathlib import Path

import numpy as np
import pytest
from fmce_ops.data import prepare, read_picture, read_pictures
from fmce_ops.data.images import Images
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


def test_a_picture_is_seen_as_a_data_set_would_hold_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            path = tmp_path / "raw" / split / name / "a.jpg"
            path.parent.mkdir(parents=True)
            exif = Image.Exif()
            exif[0x0112] = 8
            pixels = rng.integers(0, 256, (31, 45, 3), np.uint8)
            Image.fromarray(pixels).save(path, exif=exif)
    shares = {"per_class": None, "validation": 0.5, "test": 0.5, "seed": 0}
    out = tmp_path / "images.h5"
    prepare("image-folder", out, root=tmp_path / "raw", image_size=16, **shares)
    with Images.open(out) as images:
        stored = images.load("val")[0]
    seen = read_pictures(tmp_path / "raw" / "val", 16, 2)
    assert {bytes(image.numpy()) for image in seen} == {bytes(image.numpy()) for image in stored}


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".thumbnails/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    assert read_pictures(tmp_path, 4, 9).shape == (1, 3, 4, 4)


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
