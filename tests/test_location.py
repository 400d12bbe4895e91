"""Where a project's records belong, also when DVC runs its stages in a throw-away copy."""

import subprocess
import sys
from urllib.parse import unquote
from urllib.request import url2pathname

import pytest
from fmce_ops.tracking.location import absolute_uri, home, tracking_uri


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "my project"
    (folder / ".dvc").mkdir(parents=True)
    return folder


def copy_of(top, *, dvc_root="."):
    """What ``dvc exp run --temp`` makes of the git repository at ``top``."""
    copy = top / dvc_root / ".dvc" / "tmp" / "exps" / "standalone" / "tmpab12"
    (copy / dvc_root / ".dvc").mkdir(parents=True)
    return copy


def test_a_plain_folder_is_its_own_home(tmp_path, project):
    assert home(tmp_path) == tmp_path
    assert home(project) == project


def test_a_link_is_followed(tmp_path, project):
    (tmp_path / "link").symlink_to(project)
    assert home(tmp_path / "link") == project


@pytest.mark.parametrize("depth", [("x",), ("temp", "x"), ("a", "b", "x")])
def test_the_home_of_a_copy_is_the_project(project, depth):
    copy = project.joinpath(".dvc", "tmp", "exps", *depth)
    (copy / ".dvc").mkdir(parents=True)
    assert home(copy) == project


def test_a_folder_of_the_copy_is_that_folder_of_the_project(project):
    copy = copy_of(project)
    (copy / "sub" / "deep").mkdir(parents=True)
    assert home(copy / "sub" / "deep") == project / "sub" / "deep"


def test_a_project_in_a_subfolder_of_git_is_found_from_the_copy_of_all_of_git(tmp_path):
    # DVC copies the whole repository; the project is below the copy, as it is below git.
    copy = copy_of(tmp_path, dvc_root="nets/mine")
    assert home(copy / "nets" / "mine") == tmp_path / "nets" / "mine"


@pytest.mark.parametrize("place", [".dvc/tmp", ".dvc/tmp/exps", "tmp/exps/x", ".dvc/exps/tmp/x"])
def test_other_folders_are_no_copies(project, place):
    folder = project / place
    folder.mkdir(parents=True)
    assert home(folder) == folder


WHERE = """
from pathlib import Path
from fmce_ops.tracking.location import home

Path("home").write_text("an output")
Path(r"{answer}").write_text(f"{{Path.cwd()}}|{{home(Path.cwd())}}")
"""
STAGE = """
stages:
  where:
    cmd: {python} where.py
    deps: [where.py]
    outs:
      - home
"""


def test_dvc_itself_runs_in_a_folder_whose_home_is_the_project(project, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")

    def run(*command):
        subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=100)

    (project / ".dvc").rmdir()
    run("git", "init", "-q")
    run("git", "config", "user.email", "a@b.c")
    run("git", "config", "user.name", "a")
    run(sys.executable, "-m", "dvc", "init", "-q")
    (project / "where.py").write_text(WHERE.format(answer=tmp_path / "answer"))
    (project / "dvc.yaml").write_text(STAGE.format(python=sys.executable))
    run("git", "add", "-A")
    run("git", "commit", "-qm", "first")
    run(sys.executable, "-m", "dvc", "exp", "run", "--temp")
    ran_in, found = (tmp_path / "answer").read_text().split("|")
    assert ran_in.startswith(str(project / ".dvc" / "tmp" / "exps"))
    assert found == str(project)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{project}/mlflow.db"),
        ("sqlite:///records/mlflow.db", "sqlite:///{project}/records/mlflow.db"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
        ("https://host/path?a=b", "https://host/path?a=b"),
        ("postgresql://user:word@host/db", "postgresql://user:word@host/db"),
        ("databricks", "databricks"),
        ("file:///srv/mlruns", "file:///srv/mlruns"),
        ("file:///srv/a%20b", "file:///srv/a%20b"),
        ("file:///srv/a%2520b", "file:///srv/a%2520b"),  # of a folder named 'a%20b'
        ("/srv/mlruns", "file:///srv/mlruns"),
        ("/srv/a b", "file:///srv/a%20b"),
    ],
)
def test_an_address_is_absolute(project, uri, expected):
    assert absolute_uri(uri, project) == expected.format(project=project)


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:mlruns", "file:./mlruns"])
def test_a_relative_folder_is_in_the_project(project, uri):
    scheme, _, path = absolute_uri(uri, project).partition("://")
    assert (scheme, url2pathname(path)) == ("file", str(project / "mlruns"))


def test_the_variable_wins_over_the_default(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert tracking_uri(project) == f"sqlite:///{project}/runs.db"


def test_a_stage_in_a_copy_records_where_the_project_does(project, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (project / "mlflow.db").touch()
    before = mlflow.get_tracking_uri()
    assert unquote(tracking_uri(home(copy_of(project)))) == f"sqlite:///{project}/mlflow.db"
    assert mlflow.get_tracking_uri() == before
