"""The data sets by name: where their images are and how one image is read."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fmce_ops.data.pictures import is_picture
from fmce_ops.data.splits import IntArray
from fmce_ops.errors import DataError


class Split(Protocol):
    """The images of one split, read one at a time."""

    @property
    def labels(self) -> IntArray:
        """Labels (n,)."""

    def image(self, index: int) -> Image.Image:
        """One image; its pixels may not be decoded yet."""

    def name(self, index: int) -> str:
        """What to call that image in a message."""


@dataclass(frozen=True)
class Source:
    """A data set: its class names and the splits that it brings along."""

    classes: tuple[str, ...]
    splits: dict[str, Split]


@dataclass(frozen=True)
class ArraySplit:
    """Images in memory: ``pixels`` is uint8 (n, h, w) or (n, h, w, 3)."""

    dataset: str
    pixels: NDArray[np.uint8]
    labels: IntArray

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"image {index} of {self.dataset}"


@dataclass(frozen=True)
class FolderSplit:
    """Images in files; only their paths are in memory."""

    paths: tuple[Path, ...]
    labels: IntArray

    def image(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])


def open_source(dataset: str, root: Path) -> Source:
    """The data set of that name; ``root`` is where its files are, or are downloaded to.

    Raises
    ------
    DataError
        The name is unknown, or files are missing or damaged and could not be downloaded.
    """
    if dataset == "digits":
        return _digits()
    if dataset == "image-folder":
        return _image_folder(root)
    if dataset in DATASETS:
        return _torchvision(dataset, root)
    raise DataError(f"There is no data set {dataset!r}: choose one of {', '.join(DATASETS)}.")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    return Source(
        tuple(str(name) for name in digits.target_names),
        {"train": ArraySplit("digits", pixels, labels)},
    )


@dataclass(frozen=True)
class _Download:
    """A data set of torchvision and the folder below ``root`` that it reads."""

    read: Callable[..., Any]
    folder: str
    damaged: Callable[[Path], Iterable[str]]


def _torchvision(dataset: str, root: Path) -> Source:
    kind = _downloads()[dataset]
    try:
        parts = {
            name: kind.read(root, name == "train", download=True) for name in ("train", "test")
        }
    except Exception as error:  # torchvision trusts the headers: a damaged one may raise anything
        folder = root / kind.folder
        damaged = ", ".join(kind.damaged(folder)) or error
        raise DataError(
            f"{dataset} could not be read or downloaded, for {folder} lacks these files or holds "
            f"damaged ones: {damaged}; put the original files there, "
            "or delete the damaged ones and run again with a connection."
        ) from error
    return Source(
        tuple(parts["train"].classes),
        {
            name: ArraySplit(dataset, np.asarray(part.data), np.asarray(part.targets, np.int64))
            for name, part in parts.items()
        },
    )


def _damaged_idx(folder: Path) -> list[str]:
    from torchvision.datasets import MNIST

    names = [Path(archive).stem for archive, _ in MNIST.resources]
    return [name for name in names if not _idx_is_whole(folder / name)]


def _idx_is_whole(path: Path) -> bool:
    """Whether an idx file holds as many bytes as its header says (one byte a value)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4)
        if len(head) < 4:
            return False
        sides = file.read(4 * head[3])
    if head[:3] != b"\0\0\x08" or len(sides) < 4 * head[3]:
        return False
    values = math.prod(np.frombuffer(sides, ">i4").tolist())
    return path.stat().st_size == 4 + 4 * head[3] + values


def _damaged_batches(kind: Any) -> Callable[[Path], list[str]]:
    from torchvision.datasets.utils import check_integrity

    def damaged(folder: Path) -> list[str]:
        known = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
        return [name for name, md5 in known if not check_integrity(folder / name, md5)]

    return damaged


def _downloads() -> dict[str, _Download]:
    # Here and not above: torchvision takes seconds, and most who use images prepare none.
    from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST

    return {
        "mnist": _Download(MNIST, "MNIST/raw", _damaged_idx),
        "fashion-mnist": _Download(FashionMNIST, "FashionMNIST/raw", _damaged_idx),
        "cifar10": _Download(CIFAR10, CIFAR10.base_folder, _damaged_batches(CIFAR10)),
        "cifar100": _Download(CIFAR100, CIFAR100.base_folder, _damaged_batches(CIFAR100)),
    }


DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "image-folder")


def _image_folder(root: Path) -> Source:
    if not (root / "train").is_dir():
        raise DataError(
            f"{root / 'train'} does not exist: "
            "lay the images out as <split>/<class>/<image> with a split 'train'."
        )
    classes = _class_names(root / "train")
    if not classes:
        raise DataError(
            f"{root / 'train'} has no folder of a class: "
            "lay the images out as <split>/<class>/<image>."
        )
    splits: dict[str, Split] = {
        name: _folder_split(root / name, classes)
        for name in ("train", "val", "test")
        if (root / name).is_dir()
    }
    return Source(classes, splits)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    classes = sorted(name for name in names if not name.startswith("."))
    for name in classes:
        if not name.isprintable():  # it may be no text at all
            raise DataError(
                f"the class folder {name!a} in {folder} has a name that cannot be printed: "
                "rename it."
            )
    return tuple(classes)


def _folder_split(folder: Path, classes: tuple[str, ...]) -> FolderSplit:
    unknown = set(_class_names(folder)) - set(classes)
    if unknown:
        raise DataError(
            f"{folder / min(unknown)} has no counterpart among the training classes: "
            "add training images of that class, or remove the folder."
        )
    paths = [_image_paths(folder / name) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in paths])
    return FolderSplit(tuple(path for found in paths for path in found), labels)


def _image_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if is_picture(Path(path.name)))
