"""Write the images of a data set into one file: uint8, split, with their channel statistics."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from fmce_ops.data.images import FORMAT, ImagesSummary
from fmce_ops.data.pictures import GREY, UNREADABLE, refuse_deep, square
from fmce_ops.data.sources import Source, Split, open_source
from fmce_ops.data.splits import Part, plan_splits
from fmce_ops.errors import DataError
from fmce_ops.files import atomic

_BLOCK = 64  # images in memory at once
_VERSIONS = ("v110", "v110")  # of HDF5: the bytes of a file depend on them


def prepare(
    dataset: str,
    out: Path,
    *,
    root: Path,
    image_size: int,
    per_class: int | None,
    validation: float,
    test: float,
    seed: int,
) -> ImagesSummary:
    """Write train, val and test of ``dataset`` to the HDF5 file ``out``.

    The same inputs and seed give the same bytes. Images that are all square, of one size and no
    larger than ``image_size`` stay as they are; otherwise each is cropped to its central square
    and resized to ``image_size``. The orientation that a camera noted is heeded. All-grey data sets
    keep one channel.

    Parameters
    ----------
    dataset
        One of :data:`DATASETS`.
    root
        Folder of the data set's files; torchvision's data sets are downloaded to it if need be.
    image_size
        Side in pixels that the images may have at most.
    per_class, validation, test, seed
        See :func:`fmce_ops.data.splits.plan_splits`.

    Raises
    ------
    ParamsError
        A fraction or ``per_class`` is out of range.
    DataError
        Images are missing or damaged, or a class is empty in a split.
    DiskError
        ``out`` could not be written.
    """
    source = open_source(dataset, root)
    parts = plan_splits(
        {name: split.labels for name, split in source.splits.items()},
        source.classes,
        validation=validation,
        test=test,
        per_class=per_class,
        seed=seed,
    )
    form = _common_form(source, parts, image_size)
    with atomic(out) as temporary:
        return _write(temporary, dataset, source, parts, form)


@dataclass(frozen=True)
class _Form:
    """What every image becomes: PIL's mode "L" or "RGB", and the side in pixels."""

    mode: str
    side: int

    @property
    def channels(self) -> int:
        return len(self.mode)


def _common_form(source: Source, parts: Mapping[str, Part], image_size: int) -> _Form:
    """Look at the headers of all chosen images; the pixels are not decoded."""
    sizes: set[tuple[int, int]] = set()
    mode = "L"
    for part in parts.values():
        split = source.splits[part.source]
        for index in part.indices.tolist():
            size, image_mode = _header(split, index)
            sizes.add(size)
            if image_mode not in GREY:
                mode = "RGB"
    width, height = next(iter(sizes))
    as_they_are = len(sizes) == 1 and width == height <= image_size
    return _Form(mode, width if as_they_are else image_size)


def _header(split: Split, index: int) -> tuple[tuple[int, int], str]:
    try:
        with split.image(index) as image:
            size, mode = image.size, image.mode
    except UNREADABLE as error:
        raise _unreadable(split, index, error) from error
    refuse_deep(mode, split.name(index))
    return size, mode


def _pixels(split: Split, index: int, form: _Form) -> NDArray[np.uint8]:
    """One image as uint8 (c, s, s)."""
    try:
        with split.image(index) as image:
            return square(image, form.mode, form.side)
    except UNREADABLE as error:
        raise _unreadable(split, index, error) from error


def _unreadable(split: Split, index: int, error: Exception) -> DataError:
    return DataError(
        f"{split.name(index)} cannot be read as an image ({error}): replace it, or remove it."
    )


def _write(
    path: Path, dataset: str, source: Source, parts: Mapping[str, Part], form: _Form
) -> ImagesSummary:
    offsets = _lay_out(path, dataset, source.classes, parts, form)
    histograms = {}
    # HDF5 reports a full disk only when it closes the file, and may crash then; a plain file
    # reports it at once. So HDF5 decides where the values lie, and they are written past it.
    with path.open("r+b") as file:
        for name, part in parts.items():
            split = source.splits[part.source]
            histograms[name] = _fill(file, offsets[name], split, part, form)
    mean, std = channel_statistics(histograms["train"])
    with h5py.File(path, "r+", libver=_VERSIONS) as file:
        file.attrs.modify("mean", np.array(mean))
        file.attrs.modify("std", np.array(std))
    return ImagesSummary(
        dataset=dataset,
        counts={name: len(part.indices) for name, part in parts.items()},
        classes=source.classes,
        channels=form.channels,
        side=form.side,
        mean=mean,
        std=std,
    )


def _lay_out(
    path: Path, dataset: str, classes: tuple[str, ...], parts: Mapping[str, Part], form: _Form
) -> dict[str, tuple[int, int]]:
    """Create the file without its values; return where images and labels of each split begin."""
    with h5py.File(path, "w", libver=_VERSIONS) as file:
        # Strings of fixed length: those of variable length lie in a heap whose layout may differ.
        file.attrs["format"] = FORMAT
        file.attrs["dataset"] = np.bytes_(dataset.encode())
        file.attrs["classes"] = np.bytes_(json.dumps(classes).encode())
        file.attrs["mean"] = file.attrs["std"] = np.zeros(form.channels)
        return {
            name: _lay_out_split(file.create_group(name), len(part.indices), form)
            for name, part in parts.items()
        }


def _lay_out_split(group: Any, count: int, form: _Form) -> tuple[int, int]:
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shape = (count, form.channels, form.side, form.side)
    images = group.create_dataset("images", shape, "u1", dcpl=early, track_times=False)
    labels = group.create_dataset("labels", (count,), "<i8", dcpl=early, track_times=False)
    return images.id.get_offset(), labels.id.get_offset()


def _fill(
    file: BinaryIO, offsets: tuple[int, int], split: Split, part: Part, form: _Form
) -> NDArray[np.int64]:
    """Write labels and, block by block, images; return the histogram (c, 256) of the pixels."""
    file.seek(offsets[1])
    file.write(split.labels[part.indices].astype("<i8").tobytes())
    file.seek(offsets[0])
    histogram = np.zeros((form.channels, 256), np.int64)
    for indices in _blocks(part.indices.tolist()):
        block = np.stack([_pixels(split, index, form) for index in indices])
        file.write(block.tobytes())
        for channel in range(form.channels):
            histogram[channel] += np.bincount(block[:, channel].ravel(), minlength=256)
    return histogram


def _blocks(indices: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(indices), _BLOCK):
        yield indices[start : start + _BLOCK]


def channel_statistics(
    histogram: NDArray[np.int64],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in 0..1, exact from its histogram (c, 256).

    The deviation is given as 1 where a channel is constant, so that it can divide.
    """
    values = np.arange(256) / 255
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    std = np.sqrt((weights * (values - mean[:, None]) ** 2).sum(axis=1))
    constant = (histogram > 0).sum(axis=1) == 1
    return tuple(mean.tolist()), tuple(np.where(constant, 1.0, std).tolist())
