"""Read any rows of a store, in memory that does not grow with it."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from fmce_ops.errors import ShardError
from fmce_ops.shards.layout import refused
from fmce_ops.shards.manifest import Manifest
from fmce_ops.shards.vouch import Integers, Vouched, check_unchanged, opened, vouch

_MOST_OPEN = 128  # files at a time; systems allow 1024 to a process, and others need some


class ShardStore:
    """A store that was compared with its manifest, byte by byte, when it was opened.

    Each image has one map per phase; a row is a phase (1 to K) and a position (0 to N - 1).
    After opening, each read makes sure that the shard is still the file that was hashed (same
    inode, size and time of modification), so a training of hours hashes once.

    Attributes
    ----------
    manifest : Manifest
    index : int64 array of shape (N,)
        Number of each image in its data set.
    label : int64 array of shape (N,)
        Class of each image.
    """

    def __init__(
        self, manifest: Manifest, vouched: list[Vouched], index: Integers, label: Integers
    ) -> None:
        self.manifest = manifest
        self.index = index
        self.label = label
        self._vouched = vouched
        shards = manifest.shards
        self._first = np.array([(s.phase - 1) * manifest.images + s.start for s in shards])
        self._open: OrderedDict[int, _Maps] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> "ShardStore":
        """Check every byte of the store in ``folder`` (more than 1 GB/s), then open it.

        Raises
        ------
        ShardError
            Anything is missing, surplus, damaged, foreign or in the wrong place.
        """
        manifest = Manifest.load(folder)
        return cls(manifest, *vouch(folder, manifest))

    def batch(
        self, phases: npt.ArrayLike, positions: npt.ArrayLike, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Gather rows, in the order given.

        Parameters
        ----------
        phases, positions : int or int arrays of shape (n,)
            Broadcast against each other.
        out : array of shape (n, C, H, W), optional
            Contiguous, of the store's type; filled and returned.

        Returns
        -------
        array of shape (n, C, H, W)

        Raises
        ------
        ShardError
            A row is not in the store, or a shard changed since it was opened.
        """
        rows = self._rows(phases, positions)
        maps = self._target(len(rows), out)
        content, size = maps.reshape(-1).view(np.uint8).data, self.manifest.map_bytes
        with self._lock:
            shards = set()
            for number, row, target, length in self._pieces(rows):
                piece = content[target * size : (target + length) * size]
                self._maps(number).read(row, piece)
                shards.add(number)
            for number in shards:
                self._maps(number).check_unchanged()
        return maps

    def scan(self, phase: int, rows_per_read: int = 256) -> Iterator[npt.NDArray[Any]]:
        """All maps of a phase in order of position, as arrays of up to ``rows_per_read`` maps."""
        images = self.manifest.images
        for start in range(0, images, rows_per_read):
            yield self.batch(phase, np.arange(start, min(start + rows_per_read, images)))

    def close(self) -> None:
        """Close the files; the store may be used again and then reopens them."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def __enter__(self) -> "ShardStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _rows(self, phases: npt.ArrayLike, positions: npt.ArrayLike) -> Integers:
        """One number per row: its place when the phases are laid end to end."""
        phase, position = np.broadcast_arrays(np.atleast_1d(phases), positions)
        phases_held, images = self.manifest.phases, self.manifest.images
        inside = (phase >= 1) & (phase <= phases_held) & (position >= 0) & (position < images)
        if not inside.all():
            bad = int(np.argmin(inside))
            raise ShardError(
                f"The store has no row of phase {phase[bad]}, position {position[bad]}: "
                f"phases run from 1 to {phases_held}, positions from 0 to {images - 1}."
            )
        return (phase.astype(np.int64) - 1) * images + position

    def _pieces(self, rows: Integers) -> Iterator[tuple[int, int, int, int]]:
        """Runs of rows that are consecutive in a shard and in the batch, in the order on disk.

        Each is the number of the shard, the first row in it, its place in the batch, the length.
        """
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        shard = np.searchsorted(self._first, rows, side="right") - 1
        follows = (np.diff(rows) == 1) & (np.diff(order) == 1) & (np.diff(shard) == 0)
        begins = np.flatnonzero(np.concatenate([[True], ~follows])[: len(rows)])
        lengths = np.diff(begins, append=len(rows))
        within = rows - self._first[shard]
        columns = (shard[begins], within[begins], order[begins], lengths)
        return zip(*(column.tolist() for column in columns), strict=True)

    def _target(self, n: int, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        shape, dtype = (n, *self.manifest.shape), np.dtype(self.manifest.dtype)
        if out is None:
            return np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous {dtype} array of shape {shape}")
        return out

    def _maps(self, number: int) -> "_Maps":
        """The opened maps of one shard; the shard used longest ago makes room."""
        if number not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            kind = _ZstdMaps if self.manifest.compression else _PlainMaps
            self._open[number] = kind(self._vouched[number], self.manifest)
        self._open.move_to_end(number)
        return self._open[number]


class _Maps(Protocol):
    """The maps of one open shard."""

    def read(self, row: int, out: memoryview) -> None:
        """Fill the bytes ``out`` with consecutive maps from ``row`` on."""

    def check_unchanged(self) -> None:
        """Raise `ShardError` if the file is no longer the one that was hashed."""

    def close(self) -> None:
        """Close the file."""


class _PlainMaps:
    """Read with ``pread``, not a memory map, whose pages would count as this process's memory."""

    def __init__(self, vouched: Vouched, manifest: Manifest) -> None:
        self._vouched = vouched
        self._map_bytes = manifest.map_bytes
        with refused(vouched.path):
            self._descriptor = os.open(vouched.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def read(self, row: int, out: memoryview) -> None:
        place = self._vouched.offset + row * self._map_bytes
        while out:
            got = os.preadv(self._descriptor, [out], place)
            if not got:
                with refused(self._vouched.path):
                    raise ShardError("became shorter after it was checked")
            out, place = out[got:], place + got

    def check_unchanged(self) -> None:
        with refused(self._vouched.path):
            check_unchanged(self._descriptor, self._vouched.identity)

    def close(self) -> None:
        os.close(self._descriptor)


class _ZstdMaps:
    """Read through HDF5, which finds and decompresses the chunks."""

    def __init__(self, vouched: Vouched, manifest: Manifest) -> None:
        self._vouched = vouched
        self._kind = (np.dtype(manifest.dtype), (-1, *manifest.shape))
        self._life = ExitStack()
        with refused(vouched.path):
            file = self._life.enter_context(opened(vouched.path, vouched.identity))
            self._descriptor: int = file.id.get_vfd_handle()
            self._maps = file["maps"].id
            self._space = self._maps.get_space()

    def read(self, row: int, out: memoryview) -> None:
        dtype, shape = self._kind
        maps = np.frombuffer(out, dtype).reshape(shape)
        # The high-level interface takes twice as long for a single map.
        self._space.select_hyperslab((row, *[0] * (maps.ndim - 1)), maps.shape)
        with refused(self._vouched.path):
            self._maps.read(h5py.h5s.create_simple(maps.shape), self._space, maps)

    def check_unchanged(self) -> None:
        with refused(self._vouched.path):
            check_unchanged(self._descriptor, self._vouched.identity)

    def close(self) -> None:
        self._life.close()
