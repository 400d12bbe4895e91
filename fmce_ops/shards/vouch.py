"""Compare a store's folder with its manifest; nothing is used before all of it was compared.

HDF5 never parses a byte whose digest is not the manifest's: each shard is hashed first, as plain
bytes, and only then opened.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from fmce_ops.errors import ShardError
from fmce_ops.shards.layout import Layout, check_header, open_file, refused
from fmce_ops.shards.manifest import MANIFEST, Manifest, Shard

Integers = npt.NDArray[np.int64]

_PLAIN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Identity:
    """What tells whether a file is still the one that was hashed, at the price of one `fstat`."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, descriptor: int) -> "Identity":
        """Identity of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Vouched:
    """A shard whose every byte was found to be what the manifest says.

    Attributes
    ----------
    path : Path
    identity : Identity
    offset : int
        Where the maps begin in the file, in bytes; 0 when they are compressed.
    """

    path: Path
    identity: Identity
    offset: int


@dataclass(frozen=True)
class Report:
    """What `verify` found to be in order.

    Attributes
    ----------
    shards, maps, bytes : int
        Shards of the store, maps in them, and the size of the shards on disk.
    digest : str
        md5 of the manifest.
    full : bool
        Whether every byte was compared, or names and sizes alone.
    """

    shards: int
    maps: int
    bytes: int
    digest: str
    full: bool


def verify(folder: Path, full: bool = True) -> Report:
    """Compare the store in ``folder`` with its manifest.

    Parameters
    ----------
    folder : Path
    full : bool
        Compare every byte, header, index and label; otherwise only names, kinds and sizes of
        the files, which takes no time.

    Raises
    ------
    ShardError
        Anything is missing, surplus, damaged, foreign or in the wrong place.
    """
    manifest = Manifest.load(folder)
    if full:
        vouch(folder, manifest)
    else:
        check_inventory(folder, manifest)
    shards = manifest.shards
    size = sum(shard.bytes for shard in shards)
    return Report(len(shards), manifest.phases * manifest.images, size, manifest.digest, full)


def vouch(folder: Path, manifest: Manifest) -> tuple[list[Vouched], Integers, Integers]:
    """Compare every byte of the store with the manifest, in constant memory.

    Returns
    -------
    vouched : list of Vouched
        In the manifest's order.
    index, label : int64 arrays of shape (images,)
        The same in every phase.

    Raises
    ------
    ShardError
        Anything is missing, surplus, damaged, foreign or in the wrong place.
    """
    check_inventory(folder, manifest)
    paths = [Path(folder) / shard.file for shard in manifest.shards]
    # Hashing leaves the interpreter to others, so threads use the cores and keep the disk busy.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        identities = list(pool.map(_hashed, paths, manifest.shards))
    index = np.empty(manifest.images, np.int64)
    label = np.empty(manifest.images, np.int64)
    vouched = []
    for path, shard, identity in zip(paths, manifest.shards, identities, strict=True):
        with refused(path), opened(path, identity) as file:
            offset = check_header(file, layout_of(manifest, shard))
            _check_order(file, shard, index, label)
        vouched.append(Vouched(path, identity, offset))
    _check_numbers(Path(folder), manifest, index, label)
    return vouched, index, label


def check_inventory(folder: Path, manifest: Manifest) -> None:
    """Raise `ShardError` unless the folder holds the manifest's shards, whole, and nothing else."""
    sizes = {shard.file: shard.bytes for shard in manifest.shards}
    with os.scandir(folder) as entries:
        found = {entry.name: entry for entry in entries}
    for name in sizes:
        _check(name in found, Path(folder) / name, "is missing")
    for name, entry in sorted(found.items()):
        path = Path(entry.path)
        _check(name in sizes or name == MANIFEST, path, "is surplus: the manifest has no such file")
        _check(
            not entry.is_symlink(), path, "is a link (DVC makes plain files with cache.type copy)"
        )
        _check(entry.is_file(follow_symlinks=False), path, "is not a plain file")
        if name in sizes:
            size = entry.stat(follow_symlinks=False).st_size
            _check(size == sizes[name], path, f"has {size} bytes, not {sizes[name]}")


def layout_of(manifest: Manifest, shard: Shard) -> Layout:
    """What the file of ``shard`` must be."""
    kind = (manifest.shape, manifest.dtype, manifest.compression)
    return Layout(shard.phase, shard.start, shard.count, *kind)


@contextmanager
def opened(path: Path, identity: Identity) -> Iterator[h5py.File]:
    """Open a hashed shard with HDF5, unless it is no longer the file that was hashed."""
    with open_file(path) as file:
        check_unchanged(file.id.get_vfd_handle(), identity)
        yield file


def check_unchanged(descriptor: int, identity: Identity) -> None:
    """Raise `ShardError` if the file changed since it was hashed."""
    if Identity.of(descriptor) != identity:
        raise ShardError("was changed after it was checked")


def _hashed(path: Path, shard: Shard) -> Identity:
    """Hash one shard and compare; never follows a link and never waits on a pipe."""
    with refused(path), os.fdopen(os.open(path, _PLAIN), "rb") as file:
        identity = Identity.of(file.fileno())
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or identity.size != shard.bytes:
            raise ShardError("was replaced while it was checked")
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ShardError("is damaged or from another store: its sha256 is not the manifest's")
        check_unchanged(file.fileno(), identity)
    return identity


def _check_order(file: h5py.File, shard: Shard, index: Integers, label: Integers) -> None:
    """Phase 1 sets the order of the images; every other phase must have the same."""
    rows = slice(shard.start, shard.start + shard.count)
    for name, known in (("index", index), ("label", label)):
        found: Any = file[name][:]
        if shard.phase == 1:
            known[rows] = found
        elif not np.array_equal(known[rows], found):
            raise ShardError(f"has another {name} order than phase 1")


def _check_numbers(folder: Path, manifest: Manifest, index: Integers, label: Integers) -> None:
    path = folder / MANIFEST
    _check(index.min() >= 0, path, "vouches for an index below 0")
    _check(len(np.unique(index)) == len(index), path, "vouches for the same image twice")
    if manifest.classes is not None:
        within = label.min() >= 0 and label.max() < manifest.classes
        _check(bool(within), path, f"vouches for a label outside its {manifest.classes} classes")


def _check(holds: bool, path: Path, problem: str) -> None:
    if not holds:
        raise ShardError(f"{path} {problem}: restore the folder or make the store again.")
