"""How a loop tells what it does: a small protocol, so that loops know no MLflow and no terminal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Row:
    """What one step of a loop (an epoch, a recorded point, a shard) came to.

    ``time`` is in milliseconds since 1970; ``values`` has finite numbers only.
    ``again`` says that the step was done before a resumption, and is told again.
    """

    step: int
    values: Mapping[str, float]
    time: int
    again: bool = field(default=False, compare=False)  # of the telling, not of the step


class Reporter(Protocol):
    """Listens to a loop."""

    def begin(self, task: str, total: int) -> None:
        """A loop of ``total`` steps starts or goes on."""

    def row(self, row: Row) -> None:
        """A step is done. After a resumption the earlier steps are told again, marked so."""


class Reporters:
    """Tells several reporters the same; none of them is needed."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def begin(self, task: str, total: int) -> None:
        for reporter in self._reporters:
            reporter.begin(task, total)

    def row(self, row: Row) -> None:
        for reporter in self._reporters:
            reporter.row(row)
