"""``fmce-ops init``: the same pipeline in anyone's git repository."""

import subprocess
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
        ``folder`` is no git repository, or files exist and ``force`` is not set; then nothing is
        written.
    """
    inside = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--is-inside-work-tree"], capture_output=True
    )
    if not folder.is_dir() or inside.returncode:
        raise FmceError(f"{folder} is no git repository: run 'git init' there first.")
    standing = [name for name in _FILES.values() if (folder / name).exists()]
    if standing and not force:
        raise FmceError(
            f"{folder / standing[0]} exists and was not touched: move it away, or run "
            "'fmce-ops init --force' to overwrite it."
        )
    done = []
    for template, name in _FILES.items():
        write_text(folder / name, _template(template))
        done.append(f"wrote {folder / name}")
    for template, name in _IGNORED.items():
        done += _extend(folder / name, _template(template).splitlines())
    return [*done, *_dvc(folder), "now run: dvc repro"]


def _template(name: str) -> str:
    return (files("fmce_ops") / "templates" / name).read_text(encoding="utf-8")


def _extend(path: Path, lines: list[str]) -> list[str]:
    """Append the lines that are missing; what is there stays as it is."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
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
    top = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], cwd=folder, capture_output=True, text=True
    ).stdout.strip()
    sub = [] if Path(top) == folder.resolve() else ["--subdir"]
    done = subprocess.run(["dvc", "init", "-q", *sub], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise FmceError(f"'dvc init' failed in {folder} ({done.stderr.strip()}): run it by hand.")
    return [f"initialised DVC in {folder}"]
