"""What the terminal shows: progress of the loops, tables of results."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fmce_ops.training.reporter import Row

if TYPE_CHECKING:
    from fmce_ops.shards import Description
    from fmce_ops.stages.evaluate import Evaluation
    from fmce_ops.stages.explain import Explanation
    from fmce_ops.stages.score import Scored

_SHOWN = {
    "epoch": "epoch {:.4g}",
    "phase": "phase {:.0f}",
    "train/loss": "loss {:.4f}",
    "val/loss": "val loss {:.4f}",
    "val/accuracy": "val acc {:.4f}",
    "cqi": "CQI {:.2e}",
    "images_per_second": "{:.0f} images/s",
}


_BRIEF = {name: form for name, form in _SHOWN.items() if not name.startswith("val/")}


def _words(row: Row, shown: Mapping[str, str]) -> str:
    words = [form.format(row.values[name]) for name, form in shown.items() if name in row.values]
    return "  ".join(words)


class PlainProgress:
    """One line a step, for logs and pipes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return

    def begin(self, task: str, total: int) -> None:
        """Remember what the steps are of."""
        self._task, self._total, self._started, self._first = task, total, time.monotonic(), 0

    def row(self, row: Row) -> None:
        """Print the step with the time that is left at this pace."""
        self._first = self._first or row.step
        done = row.step - self._first + 1
        left = (time.monotonic() - self._started) / done * (self._total - row.step)
        print(
            f"{self._task} {row.step}/{self._total}  {_words(row, _SHOWN)}  {left:.0f} s left",
            flush=True,
        )


class RichProgress:
    """One live line that fits into 80 columns: the newest figures and the remaining time."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, task: str, total: int) -> None:
        """Start a line."""
        self._task = self._bar.add_task(task, total=total, figures="")

    def row(self, row: Row) -> None:
        """Show the step."""
        self._bar.update(self._task, completed=row.step, figures=_words(row, _BRIEF))


def show_store(folder: Path, description: "Description") -> None:
    """A table of the store, a row a phase, with the totals and where the maps come from."""
    shape = " x ".join(map(str, description.shape))
    kind = f"{description.dtype}, {description.compression or 'not compressed'}"
    console = Console()
    title = f"{folder}: {description.maps} maps of {shape}, {kind}"
    console.print(title, soft_wrap=True, markup=False)
    table = Table()
    for heading in ("phase", "shards", "maps", "MiB"):
        table.add_column(heading, justify="right")
    for phase in description.phases:
        size = f"{phase.bytes / 2**20:.1f}"
        table.add_row(str(phase.phase), str(phase.shards), str(phase.maps), size)
    table.add_section()
    size = f"{description.bytes / 2**20:.1f}"
    table.add_row("all", str(description.shards), str(description.maps), size)
    console.print(table)
    console.print(f"version {description.digest}, {description.ratio:.2f} bytes per byte on disk")
    for name, value in description.provenance.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)


def show_evaluation(result: "Evaluation") -> None:
    """The figures and the confusion matrix."""
    console = Console()
    title = f"{result.model_uri} on {result.count} test {result.unit}"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.figures.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    console.print(table)
    matrix = Table(title="confusion (rows: true, columns: predicted)")
    names = [escape(name) for name in result.names]
    for heading in ("", *names):
        matrix.add_column(heading, justify="right")
    for i, (name, row) in enumerate(zip(names, result.confusion, strict=True)):
        cells = [f"[bold]{n}[/bold]" if i == j else str(n) for j, n in enumerate(row)]
        matrix.add_row(name, *cells)
    console.print(matrix)


def show_path(found: "Explanation") -> None:
    """Open filters of every layer, and the classes whose paths are nearest."""
    console = Console()
    opened, filters = map(sum, zip(*found.open.values(), strict=True))
    line = f"{found.image}: {opened} of {filters} filters open"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    layers = Table()
    layers.add_column("layer")
    layers.add_column("open", justify="right")
    layers.add_column("")
    for name, (some, all_of_them) in found.open.items():
        layers.add_row(escape(name), f"{some}/{all_of_them}", "█" * round(20 * some / all_of_them))
    console.print(layers)
    classes = Table(title="classes whose paths are nearest")
    for heading in ("class", "gates that agree", "probability"):
        classes.add_column(heading, justify="left" if heading == "class" else "right")
    for name, (agreement, probability) in list(found.classes.items())[:5]:
        classes.add_row(escape(name), f"{agreement:.3f}", f"{probability:.3f}")
    console.print(classes)
    console.print(f"adversarial score {found.adversarial:.3f}", highlight=False)
    console.print(f"drawn to {found.figure}", markup=False, highlight=False, soft_wrap=True)


def show_scores(found: "Scored") -> None:
    """The maturity of each module with its interval, and what to train next."""
    console = Console()
    line = f"{found.network}, {found.images} image{'s' if found.images > 1 else ''}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    table = Table()
    for heading in ("module", "maturity", "interval", ""):
        table.add_column(heading, justify="left" if heading in ("module", "") else "right")
    for name, score in found.modules.items():
        interval = f"{score.low:.2f} to {score.high:.2f}"
        at_start = name in found.untrained
        shown = "at its random start" if at_start else "█" * round(20 * score.value)
        table.add_row(escape(name), f"{score.value:.2f}", interval, shown)
    console.print(table)
    console.print(f"train next: {found.next}", markup=False, highlight=False)
