"""``fmce-ops init``: the same pipeline in anyone's git repository."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from fmce_ops.errors import FmceError
from fmce_ops.files import write_text

_FILES = {"dvc.yaml": "dvc.yaml", "params.yaml": "params.yaml"}
_IGNORED = {"gitignore": ".gitignore", "dvcignore": ".dvcignore"}


def scaffold(folder: Path, *, force: bool = False) -> list[str]:
    """Write what is missing and say what was done; ``force`` overwrites pipeline files.

    Raises
    ------
    FmceError
        There is no git, ``folder`` is no git repository, files exist and ``force`` is not set, or
        what git and DVC ignore cannot be read; then nothing is written.
    """
    if not folder.is_dir() or _git(folder, "--is-inside-work-tree") != "true":
        raise FmceError(
            f"{folder} is no git repository with files in it: run 'git init' there first."
        )
    standing = [name for name in _FILES.values() if (folder / name).exists()]
    if standing and not force:
        raise FmceError(
            f"{folder / standing[0]} exists and was not touched: move it away, or run "
            "'fmce-ops init --force' to overwrite it."
        )
    ignored = {name: _read(folder / name) for name in _IGNORED.values()}
    done = []
    for template, name in _FILES.items():
        write_text(folder / name, _template(template))
        done.append(f"wrote {folder / name}")
    for template, name in _IGNORED.items():
        done += _extend(folder / name, ignored[name], _template(template).splitlines())
    return [*done, *_dvc(folder), "now run: dvc repro"]


def _template(name: str) -> str:
    return (files("fmce_ops") / "templates" / name).read_text(encoding="utf-8")


def _git(folder: Path, question: str) -> str:
    """What ``git rev-parse`` answers; empty where it knows none."""
    words = ["git", "-C", str(folder), "rev-parse", question]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise FmceError("git cannot be found: install it, or add it to the PATH.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise FmceError(
            f"{path} cannot be read as UTF-8 ({error}): save it as such, or move it away."
        ) from error


def _extend(path: Path, text: str, lines: list[str]) -> list[str]:
    """Append the lines that are missing; what is there stays as it is."""
    missing = [line for line in lines if line not in text.splitlines()]
    if not missing:
        return []
    gap = "" if not text or text.endswith("\n") else "\n"
    write_text(path, text + gap + "\n".join(missing) + "\n")
    return [f"added {len(missing)} lines to {path}"]


def _dvc(folder: Path) -> list[str]:
    """Make it a DVC project where it is none yet."""
    if any((parent / ".dvc").is_dir() for parent in [folder.resolve(), *folder.resolve().parents]):
        return []
    sub = [] if Path(_git(folder, "--show-toplevel")) == folder.resolve() else ["--subdir"]
    words = [sys.executable, "-m", "dvc", "init", "-q", *sub]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise FmceError(f"'dvc init' failed in {folder} ({done.stderr.strip()}): run it by hand.")
    return [f"initialised DVC in {folder}"]
