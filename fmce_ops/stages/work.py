"""Work folders: what a running stage keeps, so that a killed one goes on where it was.

They live in ``.fmce/`` of the project, outside DVC's outputs, because DVC deletes a stage's outputs
before it starts the stage. A folder is named for the stage's parameters and inputs: other settings
never see its contents. ``.fmce/`` may be removed whenever no stage is running.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from filelock import FileLock, Timeout

from fmce_ops.errors import DiskError, ModelError, ParamsError
from fmce_ops.files import atomic, disk_reason, file_digest, write_json

FOLDER = ".fmce"
MANIFEST = "manifest.json"
_FINISHED, _RUN = "finished.json", "run-key.json"


@dataclass(frozen=True)
class Work:
    """The work folder of one stage."""

    path: Path

    def run_key(self) -> str:
        """What the tracked run of this work is found by; it is kept before there is a run."""
        file = self.path / _RUN
        if not file.exists():
            write_json(file, {"key": uuid4().hex})
        return _kept(file)["key"]

    def finish(self, outputs: Mapping[str, str]) -> None:
        """All outputs (path: MD5, of files alone) are in their place."""
        write_json(self.path / _FINISHED, dict(outputs))


@contextlib.contextmanager
def open_work(
    project: Path, stage: str, key: Mapping[str, Any], *, first: bool = True
) -> Iterator[Work]:
    """The work folder for ``stage`` with ``key``, held by its ``first`` process against others.

    Finished folders are dropped when the next stage starts: until DVC has recorded the outputs, a
    kill must not cost the work. If DVC has recorded them, the user wants the stage run anew.
    """
    text = json.dumps(key, sort_keys=True)
    path = project / FOLDER / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not first:
        yield Work(path)
        return
    with _held(path.with_suffix(".lock")):
        _drop_finished(project, path)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "key.json", dict(key))
        yield Work(path)


@contextlib.contextmanager
def _held(file: Path) -> Iterator[None]:
    """Hold the lock; two experiments that share a stage wait for each other."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"the folder {file.parent} cannot be made ({disk_reason(error)}): "
            "see that it is no file and that the project can be written."
        ) from error
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning(
            "another process runs the same stage with the same inputs; waiting for it (%s)", file
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _drop_finished(project: Path, mine: Path) -> None:
    for finished in (project / FOLDER).glob(f"*/{_FINISHED}"):
        folder = finished.parent
        if folder == mine:
            if _recorded(_kept(finished)):
                shutil.rmtree(folder)
            continue
        with contextlib.suppress(Timeout), FileLock(folder.with_suffix(".lock"), timeout=0):
            shutil.rmtree(folder)  # a folder that is held is being repeated: it stays
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _kept(file: Path) -> dict[str, str]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(kept, dict):
            return kept
        reason = "it holds no object"
    except (OSError, ValueError) as error:
        reason = disk_reason(error) if isinstance(error, OSError) else str(error)
    raise DiskError(
        f"{file} is damaged ({reason}): remove {file.parent}; the stage then starts anew."
    )


def _recorded(outputs: Mapping[str, str]) -> bool:
    recorded = recorded_digests(Path("dvc.lock"))
    return all(recorded.get(path) == digest for path, digest in outputs.items())


def recorded_digests(lock: Path) -> dict[str, str]:
    """What DVC last recorded of every output: path -> MD5 (of a folder, DVC's ``.dir`` digest)."""
    if not lock.exists():
        return {}
    try:
        stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages") or {}
        outputs = [output for stage in stages.values() for output in stage.get("outs", [])]
        return {output["path"]: output["md5"] for output in outputs if "md5" in output}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(
            f"{lock} is not as DVC writes it ({reason}): take it from the last commit, "
            "or remove it and run 'dvc repro'."
        ) from error


def digest(path: Path) -> str:
    """MD5 of a file, as DVC records it; of a folder, MD5 of the file that vouches for the rest."""
    if path.is_dir():
        return file_digest(path / MANIFEST, "md5")
    return file_digest(path, "md5")


def publish(files: Mapping[str, Path], folder: Path) -> None:
    """Make ``folder`` of the named files, at once and without copying where the disk can link.

    A name may have folders of its own.

    A ``manifest.json`` with the SHA-256 of each file is added where the files bring none.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _fill(temporary, files)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, files: Mapping[str, Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        link(source, folder / name)
    if MANIFEST not in files:
        digests = {name: file_digest(source) for name, source in files.items()}
        write_json(folder / MANIFEST, {"sha256": digests})


def vouched(folder: Path) -> list[Path]:
    """The files of a published folder, each checked, in the order of the numbers in their names.

    Raises
    ------
    ModelError
        A file is missing or its bytes are not those that were published.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        wrong = [name for name in digests if file_digest(folder / name) != digests[name]]
        if not digests:
            raise ValueError(f"{MANIFEST} names no file")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} is not complete ({error}): run 'dvc repro' or 'dvc pull' again."
        ) from error
    if wrong:
        raise ModelError(
            f"{folder / wrong[0]} was changed after it was made: remove {folder} and run "
            "'dvc repro' or 'dvc checkout'."
        )
    return [folder / name for name in sorted(digests, key=_numbered)]


def _numbered(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, or a copy where the disk cannot link."""
    try:
        os.link(source, target)
    except OSError:
        with atomic(target) as copy:
            shutil.copyfile(source, copy)
