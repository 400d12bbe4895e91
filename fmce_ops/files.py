"""Files appear whole or not at all, and are known by their digest."""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fmce_ops.errors import DiskError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success fsync it and rename it to ``path``.

    On any failure the temporary file is removed and ``path`` is as it was before.

    Raises
    ------
    DiskError
        The disk is full, the folder cannot be written, or ``path`` names no file.
    """
    if not path.name:
        raise DiskError(f"'{path}' is a folder: give the name of a file in it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        if is_disk_failure(error):
            raise DiskError(
                f"{path} could not be written ({disk_reason(error)}): "
                "free some space or choose another folder, then run the same command again."
            ) from error
        raise
    finally:
        with suppress(OSError):  # a folder that cannot be reached has nothing of ours to remove
            temporary.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of ``path``; no other process may be writing it.

    SQLite keeps a journal beside a database, under its name and ``-journal``.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
    *(errno.EISDIR, errno.ENAMETOOLONG),
}


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that it came from, says that the disk is full."""
    while error is not None:
        words = str(error)
        if "No space left on device" in words or "database or disk is full" in words:
            return True
        error = error.__cause__ or error.__context__
    return False


def is_disk_failure(error: OSError) -> bool:
    """Whether the disk refused; h5py reports some of these without an ``errno``, in words."""
    return error.errno in _DISK_ERRORS or "No space left" in str(error)


def disk_reason(error: OSError) -> str:
    """The system's words for what went wrong, without the path."""
    return os.strerror(error.errno).lower() if error.errno else "no space left on device"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_table(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write CSV; numbers are written so that they read back exactly."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes (``md5`` is what DVC records)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
