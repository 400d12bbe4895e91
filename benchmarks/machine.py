"""What a figure was taken on and by: stands beside it on each page."""

import os
import platform
import subprocess
from pathlib import Path


def processor() -> str:
    """Its name, with family and model where they are known: names are often shortened."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    pairs = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    facts = {name.strip(): value.strip() for name, value in pairs.items()}
    name = facts.get("model name", platform.machine())
    if {"cpu family", "model"} <= set(facts):
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def cores() -> str:
    """Number and kind."""
    return f"{os.cpu_count()} cores of an {processor()}"


def commit() -> str:
    """The commit of this code, with a plus where code differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return ""
        return done.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if dirty else "")
