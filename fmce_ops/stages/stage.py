"""What all stages share: parameters, work folder, one tracked run, outputs that appear whole."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmce_ops import __version__
from fmce_ops.errors import DataError
from fmce_ops.files import remove_leftovers
from fmce_ops.stages.params import Params, section_values
from fmce_ops.stages.work import digest, open_work, recorded_digests
from fmce_ops.tracking.location import home
from fmce_ops.tracking.runs import OUTPUT_TAG, Run, tracked
from fmce_ops.training.reporter import Reporter, Reporters

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from matplotlib.figure import Figure

IMAGES = Path("data/images.h5")
CHECKPOINTS = Path("data/checkpoints")
PHASES = Path("data/phases")
FMCS = Path("data/fmcs")
TARGETS = Path("data/targets")
PATHS = Path("data/paths.h5")
STUDY = Path("data/study")
RESULTS = Path("results")
LOSSES, MARKERS = RESULTS / "losses.csv", RESULTS / "markers.json"


@dataclass(frozen=True)
class Stage:
    """An open stage.

    Attributes
    ----------
    folder : its work folder; what is there survives a kill.
    run : its tracked run; None in the processes beside the first.
    reporter : tells the run and the terminal.
    inputs : path -> MD5 of what it reads.
    listeners : reporters beside the run.
    """

    name: str
    folder: Path
    run: Run | None
    reporter: Reporter
    inputs: Mapping[str, str]
    listeners: Sequence[Reporter] = ()

    @contextmanager
    def beneath(self, name: str, tags: Mapping[str, str]) -> Iterator[Reporter]:
        """A reporter with a run of its own beneath the stage's, for one training of several."""
        if self.run is None:
            yield Reporters()
            return
        with self.run.child(name, {"fmce.stage": f"{self.name}-arm", **tags}) as child:
            yield Reporters(child, *self.listeners)

    def figure(self, figure: "Figure", name: str) -> None:
        """Show a picture in the run and keep it as an output of the stage."""
        from fmce_ops.figures import save_figure

        path = RESULTS / self.name / name
        save_figure(figure, path)
        if self.run:
            self.run.file(path, "figures")


@contextmanager
def open_stage(
    name: str,
    params: Params,
    sections: Sequence[str],
    *,
    inputs: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    progress: Reporter | None = None,
    fabric: "Fabric | None" = None,
) -> Iterator[Stage]:
    """Open a stage: in the first process its work folder and run, in the others the folder alone.

    Parameters
    ----------
    sections : the sections of ``params.yaml`` that the stage depends on.
    inputs, outputs : what DVC knows as its dependencies and outputs.

    Raises
    ------
    DataError
        An input is missing.
    """
    values = section_values(params, *sections)
    digests = _digests(inputs)
    key = {"stage": name, "version": __version__, "params": values, "inputs": digests}
    project = home(Path.cwd())
    listeners = [progress] if progress else []
    first = fabric is None or fabric.is_global_zero
    with open_work(project, name, key, first=first) as work:
        if fabric is not None and not first:
            fabric.barrier()
            yield Stage(name, work.path, None, Reporters(), digests)
            return
        for path in outputs:
            remove_leftovers(path)
        with tracked(name, work.run_key(), params=values, tags=_tags(name, params, digests)) as run:
            _record_inputs(run, params, digests)
            if fabric is not None:
                fabric.barrier()
            reporter = Reporters(run, *listeners)
            yield Stage(name, work.path, run, reporter, digests, listeners)
            made = _digests(outputs)
            run.tags({OUTPUT_TAG + path: value for path, value in made.items()})
        work.finish({str(path): made[str(path)] for path in outputs if path.is_file()})


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise DataError(
            f"{missing[0]} is missing: run 'dvc repro', which makes it, or 'dvc pull' to fetch it."
        )
    return {str(path): digest(path) for path in paths}


def _tags(name: str, params: Params, digests: Mapping[str, str]) -> dict[str, str]:
    recorded = recorded_digests(Path("dvc.lock"))
    tags: dict[str, Any] = {
        "fmce.stage": name,
        "fmce.dataset": params.data.dataset,
        "fmce.backbone": params.model.backbone,
        "fmce.command": f"dvc repro --single-item --force {name}",
    }
    for path, value in digests.items():
        tags[f"fmce.input.{path}"] = value
        tags[f"fmce.dvc.{path}"] = recorded.get(path, "not recorded")
    return tags


def _record_inputs(run: Run, params: Params, digests: Mapping[str, str]) -> None:
    parents = run.makers(digests)
    run.tags({"fmce.builds_on": ",".join(parents)})
    for path, value in digests.items():
        run.dataset(Path(path), f"{params.data.dataset}:{path}", value, "input")
