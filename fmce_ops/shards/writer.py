"""Write a shard batch by batch, in constant memory; it appears whole or not at all."""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from fmce_ops.errors import ShardError
from fmce_ops.files import atomic, file_digest, remove_leftovers
from fmce_ops.shards.following import FollowingHash
from fmce_ops.shards.layout import Layout, check_header, create, finish, open_file, refused
from fmce_ops.shards.manifest import Shard, check_layout, map_bytes, shard_file

Integers = npt.NDArray[np.int64]

# The exponent of infinity and NaN: at or above it, sign aside, no bit pattern is a number.
_NOT_FINITE = {
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "float32": (np.uint32, 2**31 - 1, 0x7F800000),
}


class ShardWriter:
    """Writes one shard, ``phase-<phase>-part-<part>.h5`` in ``folder``, from batches in order.

    The same maps give the same bytes, however they are split into batches.

    Parameters
    ----------
    folder : Path
        The store's folder; made if it is not there.
    phase, part : int
        Phase counts from 1, the parts of a phase from 0.
    start, count : int
        The shard will hold positions ``start`` to ``start + count - 1``, and exactly these.
    shape : tuple of int
        Shape of one map, e.g. ``(C, H, W)``.
    dtype : {"float16", "float32"}
    compression : {None, "zstd"}
        None is about ten times faster to read at random; zstd halves the maps of a ReLU network.

    Examples
    --------
    >>> with ShardWriter(folder, phase=1, part=0, start=0, count=2, shape=(8, 4, 4)) as writer:
    ...     writer.append(torch.rand(2, 8, 4, 4), index=[0, 1], label=[7, 3])
    >>> shard = writer.close()
    """

    def __init__(
        self,
        folder: Path,
        *,
        phase: int,
        part: int,
        start: int,
        count: int,
        shape: tuple[int, ...],
        dtype: str = "float16",
        compression: str | None = None,
    ) -> None:
        check_layout(dtype, compression, shape)
        self._layout = Layout(phase, start, count, tuple(shape), dtype, compression)
        self._path = Path(folder) / shard_file(phase, part)
        self._part = part
        self._rows = 0
        self._held = np.empty((0, *shape), dtype)
        self._shard: Shard | None = None
        remove_leftovers(self._path)
        self._life = ExitStack()
        self._hash = self._life.enter_context(FollowingHash())
        self._temporary = self._life.enter_context(atomic(self._path))
        self._life.enter_context(_disk_failures_as_os_errors())
        with self._discarded_on_error():
            create(self._temporary, self._layout)
            self._begin = self._start_hash()
            self._file = self._life.enter_context(open_file(self._temporary, "r+"))
            # Kept open: HDF5 holds small writes back, and only a flush reports that they fail.
            self._datasets = dict(self._file)

    def append(self, maps: Any, index: npt.ArrayLike, label: npt.ArrayLike) -> None:
        """Add the next maps.

        Parameters
        ----------
        maps : array or tensor of shape (n, C, H, W)
            Any float type; rounded to the shard's, where they are.
        index : array of shape (n,)
            Number of each image in its data set.
        label : array of shape (n,)
            Class of each image.

        Raises
        ------
        ShardError
            A value is not finite or too large for the type, shapes do not fit, or there are more
            maps than promised. The shard is discarded.
        DiskError
            The disk is full. The shard is discarded.
        """
        with self._discarded_on_error():
            rows, labels = _integers(index), _integers(label)
            values = self._converted(maps)
            self._check_fit(values, rows, labels)
            self._check_finite(values, maps, rows)
            stop = self._rows + len(values)
            self._datasets["index"][self._rows : stop] = rows
            self._datasets["label"][self._rows : stop] = labels
            self._write(values, stop)

    def close(self) -> Shard:
        """Finish the file: flush it to the disk, give it its name, and return its record.

        Raises
        ------
        ShardError
            There are fewer maps than promised. The shard is discarded.
        DiskError
            The disk is full. The shard is discarded.
        """
        if self._shard is None:
            with self._discarded_on_error():
                self._shard = self._finish()
        return self._shard

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._life.__exit__(kind, error, traceback)

    @contextmanager
    def _discarded_on_error(self) -> Iterator[None]:
        with ExitStack() as guard:
            guard.push(self._life)
            yield
            guard.pop_all()

    def _start_hash(self) -> int:
        """Hash the header while no one has the file open, for then it is as it will be.

        Returns where the maps begin, 0 when they are compressed.
        """
        with open_file(self._temporary) as file:
            begin: int = file["maps"].id.get_offset() or 0
        self._hash.start(self._temporary, begin)
        return begin

    def _converted(self, maps: Any) -> npt.NDArray[Any]:
        """The maps in the shard's type; too large a value becomes infinite."""
        dtype = self._layout.dtype
        if isinstance(maps, torch.Tensor):
            layout = torch.contiguous_format
            return maps.detach().to(getattr(torch, dtype), memory_format=layout).cpu().numpy()
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(maps, dtype=dtype)

    def _check_finite(self, values: npt.NDArray[Any], maps: Any, index: Integers) -> None:
        kind, magnitude, limit = _NOT_FINITE[self._layout.dtype]
        bits = values.view(kind).reshape(len(values), math.prod(self._layout.shape))
        # Bits, and few enough to stay in the processor's cache: ten times faster than isfinite.
        step = max(1, 2**18 // map_bytes(self._layout.shape, self._layout.dtype))
        for first in range(0, len(bits), step):
            if (bits[first : first + step] & magnitude).max() >= limit:
                largest = (bits[first : first + step] & magnitude).max(axis=1)
                row = first + int(np.argmax(largest >= limit))
                self._refuse(maps[row], int(index[row]))

    def _refuse(self, given: Any, number: int) -> NoReturn:
        tensor = isinstance(given, torch.Tensor)
        image = given.detach() if tensor else torch.from_numpy(np.asarray(given, np.float64))
        where = f"Phase {self._layout.phase}, image {number}"
        if torch.isfinite(image).all():
            raise ShardError(
                f"{where}: a value of {image.abs().max().item():.6g} does not fit "
                f"{self._layout.dtype}: write the store with dtype float32."
            )
        raise ShardError(
            f"{where}: the feature map is not finite: lower the learning rate and train again."
        )

    def _check_fit(self, values: npt.NDArray[Any], *numbers: Integers) -> None:
        n, shape = len(values), self._layout.shape
        if values.shape[1:] != shape or any(array.shape != (n,) for array in numbers):
            raise ShardError(
                f"{self._path} takes maps of shape {shape} with one index and one label each, and "
                f"was given maps {values.shape[1:]}: give all three for the same {n} images."
            )
        if self._rows + n > self._layout.count:
            raise ShardError(
                f"{self._path} was promised {self._layout.count} maps and was given "
                f"{self._rows + n}: state the right count."
            )

    def _write(self, values: npt.NDArray[Any], stop: int) -> None:
        """Write whole chunks and hold the rest back, so that no chunk is compressed twice."""
        first = self._rows - len(self._held)
        if len(self._held):
            values = np.concatenate([self._held, values])
        last = stop if stop == self._layout.count else stop - stop % self._layout.chunk_rows
        self._datasets["maps"][first:last] = values[: last - first]
        self._held = values[last - first :].copy()
        self._rows = stop
        if self._begin:
            self._datasets["maps"].id.flush()
            size = map_bytes(self._layout.shape, self._layout.dtype)
            self._hash.follow(self._begin + stop * size)

    def _finish(self) -> Shard:
        if self._rows != self._layout.count:
            raise ShardError(
                f"{self._path} was promised {self._layout.count} maps and got {self._rows}: "
                "state the right count, or give it every image."
            )
        finish(self._file)
        self._hash.finish(self._temporary.stat().st_size)  # while the disk still writes
        self._life.close()
        return _record(self._path, self._layout, self._part, self._hash.result())


def existing(
    folder: Path,
    *,
    phase: int,
    part: int,
    start: int,
    count: int,
    shape: tuple[int, ...],
    dtype: str = "float16",
    compression: str | None = None,
) -> Shard | None:
    """The record of a shard that an earlier, interrupted run finished; None if there is none.

    The parameters are those of `ShardWriter`. The file is read from end to end.

    Raises
    ------
    ShardError
        A file of that name is there, but is not such a shard.
    """
    layout = Layout(phase, start, count, tuple(shape), dtype, compression)
    path = Path(folder) / shard_file(phase, part)
    if not path.exists() and not path.is_symlink():
        return None
    with refused(path):
        if path.is_symlink() or not path.is_file():
            raise ShardError("is not a plain file")
        with open_file(path) as file:
            check_header(file, layout)
        return _record(path, layout, part, file_digest(path))


def _record(path: Path, layout: Layout, part: int, digest: str) -> Shard:
    size = path.stat().st_size
    return Shard(path.name, layout.phase, part, layout.start, layout.count, size, digest)


@contextmanager
def _disk_failures_as_os_errors() -> Iterator[None]:
    """HDF5 reports a full disk late, when it closes the file, and as no `OSError` but in words."""
    try:
        yield
    except RuntimeError as error:
        if number := re.search(r"errno = (\d+)", str(error)):
            raise OSError(int(number[1]), str(error)) from error
        raise


def _integers(values: npt.ArrayLike) -> Integers:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ShardError(f"An index or label is a whole number, not {array.dtype}: convert it.")
    return array.astype(np.int64)
