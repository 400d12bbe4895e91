"""The digest of a file while it is being written."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType


class FollowingHash:
    """sha256 of a file that grows from front to back, taken by a thread behind its writer.

    The bytes come from the page cache, and hashing leaves the interpreter to the writer, so with
    a second core the digest costs next to no time.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._job: Future[None]
        self._file: FileIO
        self._sha = hashlib.sha256()
        self._place = 0
        self._head = b""

    def start(self, path: Path, head: int) -> None:
        """Begin with the first ``head`` bytes, a header that should not change any more."""
        self._file = path.open("rb", buffering=0)
        self._head = self._file.read(head)
        self._sha.update(self._head)
        self._place = head

    def follow(self, stop: int) -> None:
        """Go on to byte ``stop``, before which nothing will change; returns at once."""
        self._job = self._pool.submit(self._advance, stop)

    def finish(self, size: int) -> None:
        """Go on to the end of the whole file; returns at once. The file may then be renamed."""
        self._job = self._pool.submit(self._end, size)

    def result(self) -> str:
        """The digest, in hexadecimal."""
        self._job.result()
        return self._sha.hexdigest()

    def __enter__(self) -> "FollowingHash":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if hasattr(self, "_file"):
            self._file.close()

    def _advance(self, stop: int) -> None:
        buffer = memoryview(bytearray(2**18))
        self._file.seek(self._place)
        while self._place < stop:
            got = self._file.readinto(buffer[: stop - self._place])
            if not got:
                raise OSError("a file became shorter while it was written")
            self._sha.update(buffer[:got])
            self._place += got

    def _end(self, size: int) -> None:
        self._file.seek(0)
        if self._file.read(len(self._head)) != self._head:
            self._sha, self._place = hashlib.sha256(), 0
        self._advance(size)
