"""What several tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from filelock import FileLock

from tests.project import command, commit, copy_project, new_project

torch.set_num_threads(1)  # the tests themselves run side by side


@pytest.fixture(autouse=True)
def _no_tracking_store_of_another_test() -> Iterator[None]:
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A project whose pipeline has run once and was committed; for reading only.

    It is made once, and every process of the test runner reads a copy of its own.
    """
    own = tmp_path_factory.mktemp("pipeline")
    shared = own if worker_id == "master" else own.parents[1] / "pipeline"
    with FileLock(f"{shared}.lock"):
        done = shared / "done"
        if not done.exists():
            folder = new_project(shared / "project")
            command(folder, "dvc", "repro")
            commit(folder, "first run")
            done.touch()
    return copy_project(shared / "project", own / "copy")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets that are too large for the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FMCE_TEST_DATA") or beside)
    if not folder.is_dir():
        pytest.skip("no real data sets: set FMCE_TEST_DATA to the folder that holds MNIST/raw etc.")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of tiny operations, where threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
