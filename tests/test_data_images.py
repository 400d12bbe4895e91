"""Reading the file of images: what is refused, what stays usable."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from fmce_ops.data import Images, prepare
from fmce_ops.errors import DataError
from fmce_ops.files import file_digest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    out = tmp_path / "images.h5"
    prepare(
        "digits",
        out,
        root=tmp_path,
        image_size=32,
        per_class=20,
        validation=0.1,
        test=0.2,
        seed=0,
    )
    return out


def test_what_was_prepared_is_read_back(path: Path) -> None:
    with Images.open(path) as images:
        assert images.dataset == "digits"
        assert images.classes == tuple("0123456789")
        assert (images.channels, images.side, images.counts["train"]) == (1, 8, 200)
        assert images.digest == file_digest(path, "md5")
        pixels, labels = images.load("train")
        assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
        some, their_labels = images.read("train", 30, 50)
    assert torch.equal(some, pixels[30:50]) and torch.equal(their_labels, labels[30:50])


def test_loaded_images_outlive_the_file(path: Path) -> None:
    with Images.open(path) as images:
        mapped, read = images.load("val")[0], images.read("val", 0, 30)[0]
    path.unlink()
    assert torch.equal(mapped, read)


def test_writing_to_loaded_images_leaves_the_file_alone(path: Path) -> None:
    before = file_digest(path)
    with Images.open(path) as images:
        images.load("val")[0].zero_()
    assert file_digest(path) == before


def replace(name: str, value: np.ndarray) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


def soft_link(file: h5py.File) -> None:
    del file["val/images"]
    file["val/images"] = h5py.SoftLink("/train/images")


def external_link(file: h5py.File) -> None:
    del file["val"]
    file["val"] = h5py.ExternalLink("elsewhere.h5", "/val")


def external_storage(file: h5py.File) -> None:
    shape = file["val/images"].shape
    del file["val/images"]
    file["val"].create_dataset(
        "images", shape, np.uint8, external=[("elsewhere.bin", 0, h5py.h5f.UNLIMITED)]
    )


def chunked(file: h5py.File) -> None:
    pixels = file["val/images"][:]
    del file["val/images"]
    file["val"].create_dataset("images", data=pixels, compression="gzip")


def label_out_of_range(file: h5py.File) -> None:
    file["val/labels"][0] = 10


def negative_label(file: h5py.File) -> None:
    file["train/labels"][-1] = -1


def other_format(file: h5py.File) -> None:
    file.attrs["format"] = 99


def no_classes(file: h5py.File) -> None:
    del file.attrs["classes"]


def broken_classes(file: h5py.File) -> None:
    file.attrs["classes"] = np.bytes_(b"[")


def no_mean(file: h5py.File) -> None:
    del file.attrs["mean"]


def two_means(file: h5py.File) -> None:
    file.attrs["mean"] = np.zeros(2)


def no_test(file: h5py.File) -> None:
    del file["test"]


def split_is_a_data_set(file: h5py.File) -> None:
    del file["test"]
    file["test"] = np.zeros(3)


@pytest.mark.parametrize(
    "change",
    [
        soft_link,
        external_link,
        external_storage,
        chunked,
        label_out_of_range,
        negative_label,
        other_format,
        no_classes,
        broken_classes,
        no_mean,
        two_means,
        no_test,
        split_is_a_data_set,
        replace("val/images", np.zeros((3, 1, 8, 8), np.float32)),
        replace("val/images", np.zeros((3, 8, 8), np.uint8)),
        replace("val/images", np.zeros((3, 1, 8, 8), np.uint8)),
        replace("val/labels", np.zeros(20, np.int32)),
    ],
)
def test_a_file_that_breaks_its_promise_is_refused(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=r"images\.h5 .*: prepare the images again\."):
        Images.open(path)


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_truncated_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"images\.h5 .* whole HDF5 file"):
        Images.open(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.h5 is missing"):
        Images.open(tmp_path / "absent.h5")
