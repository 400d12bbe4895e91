"""The inside of one shard: an HDF5 file with ``maps``, ``index`` and ``label``.

Written the same way always, so a file that differs in any respect is not ours and is refused
from its header alone, before anything is allocated or read for it.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fmce_ops.errors import ShardError
from fmce_ops.shards.manifest import FORMAT, map_bytes

_NAMES = {"maps", "index", "label"}
# On maps of a trained ShuffleNet (32 KiB each) plain zstd at level 1 in chunks of 32 KiB stores
# 2.1 times less; level 3 gains 1 % at half the speed, larger chunks 1 % at twice the time of a
# random read, and byte or bit shuffling before it loses.
_ZSTD_LEVEL = 1
_CHUNK_BYTES = 32 * 1024


@dataclass(frozen=True)
class Layout:
    """What a shard's file must be, known before the file is opened."""

    phase: int
    start: int
    count: int
    shape: tuple[int, ...]
    dtype: str
    compression: str | None

    @property
    def chunk_rows(self) -> int:
        """Maps that are stored, and when compressed read, as one piece."""
        if self.compression is None:
            return 1
        return min(self.count, max(1, _CHUNK_BYTES // map_bytes(self.shape, self.dtype)))

    @property
    def attributes(self) -> dict[str, int]:
        """The attributes of the file."""
        return {"format": FORMAT, "phase": self.phase, "start": self.start}

    @property
    def datasets(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and type of every dataset, in the order in which they lie in the file."""
        return {
            "maps": ((self.count, *self.shape), np.dtype(self.dtype).newbyteorder("<")),
            "index": ((self.count,), np.dtype("<i8")),
            "label": ((self.count,), np.dtype("<i8")),
        }


def create(path: Path, layout: Layout) -> None:
    """Create the file with its datasets, all of their space reserved and nothing filled in."""
    # HDF5 cannot recover from a full disk and takes the process with it, so the disk has to be
    # found full before HDF5 writes; once more behind it, as it empties the file.
    _reserve(path, layout)
    with open_file(path, "w") as file:
        for name, value in layout.attributes.items():
            file.attrs.create(name, value, dtype="<i8")
        for name, (shape, dtype) in layout.datasets.items():
            file.create_dataset(name, shape, dtype, **_storage(name, layout))
    _reserve(path, layout)


def _reserve(path: Path, layout: Layout) -> None:
    """Reserve the space of the maps uncompressed, and some for HDF5; `finish` returns the rest."""
    maps = layout.count * (map_bytes(layout.shape, layout.dtype) + 16)
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with path.open("ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, maps + maps // 32 + 2**20)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the disk's format cannot
                raise


def finish(file: h5py.File) -> None:
    """Close a file that was written, with an error if any of it did not reach the system."""
    # Closing alone is not enough: h5py passes over errors that HDF5 meets in it.
    for dataset in file.values():
        dataset.id.flush()
    file.flush()
    path, size = file.filename, file.id.get_filesize()
    file.close()
    os.truncate(path, size)


def _storage(name: str, layout: Layout) -> dict[str, Any]:
    if name == "maps" and layout.compression:
        chunks = (layout.chunk_rows, *layout.shape)
        return {"chunks": chunks, **_zstd()(clevel=_ZSTD_LEVEL)}
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return {"dcpl": properties}


def _zstd() -> Any:
    """The filter; importing it makes HDF5 know it."""
    import hdf5plugin  # here: machines that compress nothing may lack it

    return hdf5plugin.Zstd


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turn whatever HDF5 makes of a bad file into a `ShardError` that names it."""
    try:
        yield
    except ShardError as error:
        raise ShardError(
            f"The shard {path} {error}: restore the folder or make the store again."
        ) from error
    except Exception as error:
        raise ShardError(
            f"The shard {path} cannot be read ({error}): "
            "restore the folder or make the store again."
        ) from error


def open_file(path: Path, mode: str = "r") -> h5py.File:
    """Open without a lock, as stores may lie on read-only or network disks."""
    # The version is pinned, as the default changes between releases and the bytes with it.
    return h5py.File(path, mode, libver=("v108", "v108"), locking=False)


def check_header(file: h5py.File, layout: Layout) -> int:
    """Compare the header of an open file with what it must be.

    Returns
    -------
    int
        Where the maps begin in the file, in bytes; 0 when they are compressed.

    Raises
    ------
    ShardError
        Anything differs; the message is the end of a sentence about the file.
    """
    _check(file.id.get_create_plist().get_userblock() == 0, "has foreign bytes in front")
    _check_root(h5py.h5g.open(file.id, b"/"), layout)
    begins = {name: _check_dataset(file.id, name, layout) for name in layout.datasets}
    return begins["maps"]


def _check_root(root: Any, layout: Layout) -> None:
    _check(root.get_num_objs() == len(_NAMES), "does not hold maps, index and label alone")
    names = {name.decode() for name in root}
    _check(names == _NAMES, f"holds {', '.join(sorted(names))} instead of maps, index and label")
    for name in names:
        kind = root.links.get_info(name.encode()).type
        _check(kind == h5py.h5l.TYPE_HARD, f"has a link for its {name}")
    _check(h5py.h5a.get_num_attrs(root) == len(layout.attributes), "has foreign attributes")
    for name, value in layout.attributes.items():
        found = _attribute(root, name)
        _check(found == value, f"has {name} {found} where {value} belongs")


def _attribute(root: Any, name: str) -> int:
    attribute = h5py.h5a.open(root, name.encode())
    _check(attribute.shape == () and attribute.dtype == np.dtype("<i8"), f"has no number {name}")
    value = np.empty((), "<i8")
    attribute.read(value)
    return int(value)


def _check_dataset(root: Any, name: str, layout: Layout) -> int:
    """Check one dataset of the file; return where it begins, 0 where it is chunked."""
    dataset = h5py.h5o.open(root, name.encode())
    _check(isinstance(dataset, h5py.h5d.DatasetID), f"has something else for its {name}")
    shape, dtype = layout.datasets[name]
    _check(dataset.shape == shape, f"has {name} of shape {dataset.shape} where {shape} belongs")
    _check(dataset.dtype == dtype, f"has {name} of type {dataset.dtype} where {dtype} belongs")
    properties = dataset.get_create_plist()
    # External files are a property of contiguous data, virtual data a layout of its own.
    _check(properties.get_external_count() == 0, f"keeps its {name} in another file")
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if name == "maps" and layout.compression:
        _check(
            filters == [_zstd().filter_id], f"has {name} with the filters {filters}, not zstd alone"
        )
        return _check_chunks(dataset, properties, layout)
    _check(filters == [], f"has {name} with the filters {filters} where none belong")
    _check(properties.get_layout() == h5py.h5d.CONTIGUOUS, f"has {name} in pieces or elsewhere")
    return _check_extent(dataset, name)


def _check_chunks(dataset: Any, properties: Any, layout: Layout) -> int:
    _check(properties.get_layout() == h5py.h5d.CHUNKED, "has maps that are not in chunks")
    rows = layout.chunk_rows
    chunk = properties.get_chunk()
    _check(chunk == (rows, *layout.shape), f"has the chunk shape {chunk}")
    # HDF5 reads a chunk that is not there as zeros, without a word.
    whole = -(-layout.count // rows)
    _check(dataset.get_num_chunks() == whole, "lacks some of its chunks")
    return 0


def _check_extent(dataset: Any, name: str) -> int:
    offset = dataset.get_offset()
    length = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
    size = h5py.h5i.get_file_id(dataset).get_filesize()
    _check(offset is not None and offset + length <= size, f"is too short for its {name}")
    return int(offset)


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ShardError(problem)
