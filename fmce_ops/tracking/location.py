"""Where the project really lives, and where its runs are recorded."""

import contextlib
import os
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

SQLITE = "sqlite:///"


def home(workspace: Path) -> Path:
    """The project folder itself, also when ``workspace`` is DVC's throw-away copy of it.

    ``dvc exp run --queue`` and ``--temp`` run stages in ``<project>/.dvc/tmp/exps/<copy>``, which
    is deleted afterwards; records and work folders belong into the project.
    """
    workspace = workspace.resolve()
    parts = workspace.parts
    for i in range(len(parts) - 3):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            copy = next(p for p in (workspace, *workspace.parents) if (p / ".dvc").is_dir())
            return Path(*parts[:i]) / workspace.relative_to(copy)
    return workspace


def tracking_uri(project: Path) -> str:
    """``MLFLOW_TRACKING_URI`` or MLflow's default; relative places are places in ``project``."""
    import mlflow

    with contextlib.chdir(project):
        uri: str = os.environ.get("MLFLOW_TRACKING_URI") or mlflow.get_tracking_uri()
    return absolute_uri(uri, project)


def absolute_uri(uri: str, project: Path) -> str:
    """Make a relative ``sqlite:///`` address, ``file:`` address or path absolute."""
    if uri.startswith(SQLITE):
        return SQLITE + str(project / uri.removeprefix(SQLITE))
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return (project / url2pathname(parsed.path)).as_uri()
    named = parsed.scheme or uri == "databricks"  # the one server that has a bare name
    return uri if named else (project / uri).as_uri()
