"""The built wheel, used in somebody else's repository."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.project import SMALL, command, commit, write_params

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = ["-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    command(folder, sys.executable, *words)
    (built,) = folder.glob("fmce_ops-*.whl")
    return built


def test_the_wheel_holds_the_pipeline_of_the_repository(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        for name in ("dvc.yaml", "params.yaml"):
            packed = content.read(f"fmce_ops/templates/{name}").decode()
            assert packed == (ROOT / name).read_text()
        assert "fmce_ops/templates/report.html" in content.namelist()
        assert "fmce_ops/py.typed" in content.namelist()


def test_init_and_repro_in_a_repository_that_has_a_life_of_its_own(
    wheel: Path, tmp_path: Path
) -> None:
    site, theirs = tmp_path / "site", tmp_path / "theirs"
    words = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    command(tmp_path, sys.executable, *words)
    installed = {
        "PYTHONPATH": str(site),
        "PATH": f"{site / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
    }
    theirs.mkdir()
    command(theirs, "git", "init", "-q")
    (theirs / "data").mkdir()
    (theirs / "data" / "mine.txt").write_text("mine")
    (theirs / ".gitignore").write_text("*.log\n")
    command(theirs, "fmce-ops", "init", **installed)
    whence = "import fmce_ops; print(fmce_ops.__file__)"
    assert str(site) in command(theirs, sys.executable, "-c", whence, **installed).stdout
    assert yaml.safe_load((theirs / "dvc.yaml").read_text())["stages"].keys() >= {"prepare", "fmce"}
    write_params(theirs, SMALL)
    command(theirs, "git", "config", "user.email", "user@example.org")
    command(theirs, "git", "config", "user.name", "A user")
    commit(theirs, "start")
    command(theirs, "dvc", "repro", "features", **installed)
    assert (theirs / "data" / "fmcs" / "manifest.json").exists()
    assert (theirs / "data" / "mine.txt").read_text() == "mine"
    assert "data/mine.txt" in command(theirs, "git", "ls-files").stdout
