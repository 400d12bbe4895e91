"""The file of images that every later stage reads."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import h5py
import numpy as np
import torch
from torch import Tensor

from fmce_ops.data.splits import SPLITS
from fmce_ops.errors import DataError
from fmce_ops.files import file_digest

FORMAT = 1


@dataclass(frozen=True)
class ImagesSummary:
    """What a file of images holds.

    Attributes
    ----------
    counts
        Number of images of each split.
    channels, side
        The images are (channels, side, side).
    mean, std
        One value per channel over the training split, pixels taken as 0..1; ``std`` is 1 where
        a channel is constant, so that it can divide.
    """

    dataset: str
    counts: dict[str, int]
    classes: tuple[str, ...]
    channels: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Images:
    """Reader of a file that :func:`prepare` wrote; use it as a context manager.

    Attributes
    ----------
    summary
        Counts, class names, shape and channel statistics, as :func:`prepare` returned them.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self.summary = _read_summary(path, file)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open and check ``path``.

        Raises
        ------
        DataError
            The file is missing, damaged, of another format, or refers to other files.
        """
        try:
            # No lock: the file may lie on a read-only or network disk.
            file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise _damage(path, "is missing or is not a whole HDF5 file") from error
        try:
            return cls(path, file)
        except BaseException as error:
            file.close()
            if isinstance(error, (KeyError, OSError, RuntimeError, ValueError, TypeError)):
                raise _damage(path, "lacks parts or has damaged ones") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that :meth:`load` returned stay usable."""
        self._file.close()

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.summary.dataset

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split."""
        return self.summary.counts

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.summary.classes

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.summary.channels

    @property
    def side(self) -> int:
        """Side of every image in pixels."""
        return self.summary.side

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the training split, pixels taken as 0..1."""
        return self.summary.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the training split, pixels taken as 0..1."""
        return self.summary.std

    @cached_property
    def digest(self) -> str:
        """MD5 of the file, the digest by which DVC knows it."""
        return file_digest(self.path, "md5")

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Images uint8 (n, c, s, s) and labels int64 (n,) of a whole split.

        The images are mapped, not read: pages come from the disk as they are used and the system
        may drop them again, so a split may be larger than memory.
        """
        images = self._file[split]["images"]
        pixels = np.memmap(
            self.path,
            np.uint8,
            mode="c",  # private and writable, which is what torch expects of an array
            offset=images.id.get_offset(),
            shape=images.shape,
        )
        return torch.from_numpy(pixels), torch.from_numpy(self._file[split]["labels"][:])

    def read(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Images uint8 (m, c, s, s) and labels int64 (m,) of ``start`` up to ``stop``."""
        group = self._file[split]
        images, labels = group["images"][start:stop], group["labels"][start:stop]
        return torch.from_numpy(images), torch.from_numpy(labels)


def _damage(path: Path, what: str) -> DataError:
    return DataError(f"{path} {what}: prepare the images again.")


def _refuse(path: Path, what: str) -> NoReturn:
    raise _damage(path, what)


def _read_summary(path: Path, file: h5py.File) -> ImagesSummary:
    if int(file.attrs.get("format", 0)) != FORMAT:
        _refuse(path, f"is not a file of images of format {FORMAT}")
    arrays = {split: _read_split(path, file, split) for split in SPLITS}
    classes = tuple(json.loads(bytes(file.attrs["classes"])))
    for split, (_, labels) in arrays.items():
        values = labels[:]
        if values.min() < 0 or values.max() >= len(classes):
            _refuse(path, f"has labels outside its {len(classes)} classes in {split!r}")
    shapes = {images.shape[1:] for images, _ in arrays.values()}
    channels, side, width = shapes.pop()
    if shapes or side != width or channels not in (1, 3):
        _refuse(path, "has images of different or unusable shapes")
    mean, std = (_statistic(path, file, name, channels) for name in ("mean", "std"))
    return ImagesSummary(
        dataset=bytes(file.attrs["dataset"]).decode(),
        counts={split: len(labels) for split, (_, labels) in arrays.items()},
        classes=classes,
        channels=int(channels),
        side=int(side),
        mean=mean,
        std=std,
    )


def _statistic(path: Path, file: h5py.File, name: str, channels: int) -> tuple[float, ...]:
    values = np.asarray(file.attrs[name], np.float64)
    if values.shape != (channels,) or not np.isfinite(values).all():
        _refuse(path, f"has no usable {name} for its {channels} channels")
    return tuple(values.tolist())


def _read_split(path: Path, file: h5py.File, split: str) -> tuple[Any, Any]:
    if not isinstance(file.get(split, getlink=True), h5py.HardLink):
        _refuse(path, f"lacks the split {split!r} or takes it from elsewhere")
    if not isinstance(file[split], h5py.Group):
        _refuse(path, f"has no images in the split {split!r}")
    images = _dataset(path, file[split], "images", np.dtype(np.uint8), 4)
    labels = _dataset(path, file[split], "labels", np.dtype(np.int64), 1)
    if len(images) != len(labels) or not len(labels):
        _refuse(path, f"has {len(images)} images but {len(labels)} labels in {split!r}")
    return images, labels


def _dataset(path: Path, group: Any, name: str, dtype: np.dtype[Any], ndim: int) -> Any:
    """A data set whose bytes lie in this file and nowhere else, in one piece."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        _refuse(path, f"lacks {group.name}/{name} or takes it from elsewhere")
    values = group[name]
    if values.dtype != dtype or values.ndim != ndim:
        _refuse(path, f"has {values.name} as {values.dtype} {values.shape}")
    if values.external or values.is_virtual or values.chunks or values.id.get_offset() is None:
        _refuse(path, f"does not hold {values.name} in one piece of its own")
    return values
