"""Floors: a room uses rooms on its own floor and below, and the door opens at once."""

import os
import resource
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = {"mlflow", "dvc", "typer", "lightning_fabric"}


def loaded_by(*modules):
    """Names of all modules that a fresh interpreter holds after importing ``modules``."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def ground():
    """Every module of the ground floor."""
    package = Path(find_spec("fmce_ops").submodule_search_locations[0])
    rooms = [package / "convergence.py", package / "files.py", package / "errors.py"]
    for room in ("models", "data", "shards", "reverse", "pathways", "maturity"):
        rooms += (package / room).rglob("*.py")
    names = [".".join(path.relative_to(package.parent).with_suffix("").parts) for path in rooms]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_imports_keep_to_their_floors():
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_the_ground_needs_no_tracking_no_versioning_and_no_command_line():
    modules = ground()
    assert {"fmce_ops.shards.store", "fmce_ops.models", "fmce_ops.data.prepare"} <= set(modules)
    assert loaded_by(*modules) & ABOVE == set()


def test_markers_start_without_the_loops():
    assert not {"lightning_fabric", "torchvision"} & loaded_by("fmce_ops.stages.markers")


def test_the_loops_know_no_tracking():
    loops = [f"fmce_ops.training.{name}" for name in ("classifier", "features", "fmce", "metrics")]
    assert loaded_by(*loops) & {"mlflow", "dvc", "typer"} == set()


def test_convergence_needs_numpy_alone():
    loaded = {name.partition(".")[0] for name in loaded_by("fmce_ops.convergence")}
    foreign = loaded - {name.partition(".")[0] for name in loaded_by("numpy")}
    allowed = {"fmce_ops", *sys.stdlib_module_names}
    assert foreign - allowed == set()


def processor_seconds(command):
    """User CPU time of a process, and what it wrote."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, done


def test_help_comes_at_once():
    command = [sys.executable, "-m", "fmce_ops.cli", "--help"]
    processor_seconds(command)  # writes the byte code
    spent = [processor_seconds(command)[0] for _ in range(3)]
    assert statistics.median(spent) < 0.5  # CPU time, so that a busy machine does not matter


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["shards", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "fmce_ops.cli", *arguments]
    done = processor_seconds(command)[1]
    assert "Usage" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fmce_ops.errors" in loaded
    assert {name.partition(".")[0] for name in loaded} & {"torch", "mlflow", "numpy"} == set()
