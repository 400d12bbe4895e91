"""Maturity of modules in anyone's training loop, logged to the active MLflow run."""

import re
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import mlflow
from torch import Tensor, nn

from fmce_ops.errors import ModelError, TrackingError
from fmce_ops.maturity import Judge, Score, load_judge, score, start_of

_SIGN = re.compile(r"[^\w.\- /]", re.ASCII)  # what the name of a metric may not hold


class MaturityMonitor:
    """Scores the modules of one network while it trains.

    What is read of the network's random start is read once, so that a later score costs half. A
    network that cannot be scored, such as one whose weights are not finite, is warned of, and the
    training goes on.

    Parameters
    ----------
    images : (N, 3, H, W), as the network takes them; 256 are enough.
    modules : names of submodules; None: all functional modules.
    judge : None: the one that comes with this package.

    Examples
    --------
    >>> monitor = MaturityMonitor(images)
    >>> with mlflow.start_run():
    ...     for epoch in range(epochs):
    ...         train_epoch(network)
    ...         scores = monitor.update(network, epoch)
    """

    def __init__(
        self, images: Tensor, modules: Sequence[str] | None = None, *, judge: Judge | None = None
    ) -> None:
        self._images, self._modules = images, modules
        self._judge = judge or load_judge()
        self._start: Tensor | None = None

    def update(self, network: nn.Module, step: int) -> dict[str, Score]:
        """The scores now; also ``maturity/<module>`` of the active MLflow run, if there is one.

        Empty where the network cannot be scored.
        """
        asked = network, self._images, self._modules
        try:
            self._start = start_of(*asked) if self._start is None else self._start
            found = score(*asked, judge=self._judge, start=self._start)
        except ModelError as error:
            warnings.warn(f"no maturity at step {step}: {error}", stacklevel=2)
            return {}
        if mlflow.active_run():
            mlflow.log_metrics(named(found), step=step)
        return found


def named(scores: dict[str, Score]) -> dict[str, float]:
    """Scores under the names of metrics, ``maturity/<module>``; MLflow knows no other signs."""
    return {f"maturity/{_SIGN.sub('_', module)}": score.value for module, score in scores.items()}


def lightning_callback(monitor: MaturityMonitor) -> Any:
    """A callback for a Lightning ``Trainer``: scores at the end of each training epoch.

    They go to the trainer's loggers, and to the active MLflow run, if there is one.

    Raises
    ------
    TrackingError
        Neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    base: Any = _lightning().Callback

    class MaturityCallback(base):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            scores = monitor.update(pl_module, trainer.current_epoch)
            for logger in trainer.loggers:
                logger.log_metrics(named(scores), step=trainer.current_epoch)

    return MaturityCallback()


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise TrackingError("Lightning is not installed: install 'lightning' to use its Trainer.")
