"""The version of the data that a model was made from: in the workspace, or in DVC's cache."""

import json
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmce_ops.errors import ModelError
from fmce_ops.stages.work import FOLDER, digest, link
from fmce_ops.tracking.location import home


@contextmanager
def data_version(path: Path, wanted: str, recorded: str | None) -> Iterator[Path]:
    """Where version ``wanted`` of ``path`` is.

    Parameters
    ----------
    wanted : the MD5 by which the model knows its data (of a folder, that of its manifest).
    recorded : the MD5 that DVC had recorded for it, if it had.

    Raises
    ------
    ModelError
        Neither the workspace nor DVC's cache holds that version.
    """
    if path.exists() and digest(path) == wanted:
        yield path
        return
    other = "holds another version than the one that the model was made from"
    state = other if path.exists() else "is missing"
    object_file = _cache_object(recorded) if recorded else None
    if object_file is None or not object_file.exists():
        raise ModelError(
            f"{path} {state}, {wanted[:12]}, which DVC's cache does not hold: check out the commit "
            "that the model's run names and run 'dvc pull'."
        )
    logging.getLogger(__name__).warning(
        "%s %s; judging on version %s from DVC's cache",
        path,
        state,
        wanted[:12],
    )
    work = home(Path.cwd()) / FOLDER
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield _checked_out(object_file, Path(folder) / path.name)


def _cache_object(md5: str) -> Path | None:
    done = subprocess.run(["dvc", "cache", "dir"], capture_output=True, text=True)
    if done.returncode:
        return None  # not a DVC project
    return Path(done.stdout.strip()) / "files" / "md5" / md5[:2] / md5[2:]


def _checked_out(object_file: Path, target: Path) -> Path:
    """Link a file of the cache, or all files that a ``.dir`` object of the cache lists."""
    if object_file.suffix != ".dir":
        link(object_file, target)
        return target
    target.mkdir()
    for entry in json.loads(object_file.read_text()):
        source = _cache_object_beside(object_file, entry["md5"])
        if Path(entry["relpath"]).name != entry["relpath"] or not source.exists():
            raise ModelError(
                f"DVC's cache lacks {entry['relpath']} of the version that the model was made "
                "from: run 'dvc fetch' for the commit that the model's run names."
            )
        link(source, target / entry["relpath"])
    return target


def _cache_object_beside(object_file: Path, md5: str) -> Path:
    return object_file.parents[1] / md5[:2] / md5[2:]
