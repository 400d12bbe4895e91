"""What a figure was taken on, for the first line of each page."""

import os
import platform
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
