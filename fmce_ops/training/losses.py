"""The loss curve of a classifier: ``losses.csv``, one row for each recorded point."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from fmce_ops.errors import TrainingError
from fmce_ops.files import write_table


@dataclass(frozen=True)
class Point:
    """One row of ``losses.csv``: means over the point's part of the training images."""

    point: int
    epoch: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    lr: float


def write_losses(path: Path, history: Sequence[Point]) -> None:
    """Write the curve as CSV."""
    names = [column.name for column in fields(Point)]
    write_table(path, [names, *(astuple(point) for point in history)])


def read_losses(path: Path) -> list[Point]:
    """Read the curve back."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Point(int(row.pop("point")), **{name: float(text) for name, text in row.items()})
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise TrainingError(
            f"{path} is not a loss curve ({error}): run 'dvc repro' again."
        ) from None
