"""FMCE on a loss curve: smoothing, the convergence quantification indicator and epoch markers.

Source: Zhang, Chen, He, Li, "Feature Map Convergence Evaluation for Functional Module",
arXiv 2405.04041, section III. Needs NumPy alone::

    >>> monitor = ConvergenceMonitor(mu=1e-2)
    >>> for loss in losses_of_my_training_loop:
    ...     monitor.update(loss)
    ...     if monitor.converged:
    ...         break
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fmce_ops.errors import MarkerError

Losses = Sequence[float] | NDArray[np.floating]
Method = Literal["paper", "ema"]


def smooth(losses: Losses, alpha: float = 0.85, method: Method = "paper") -> NDArray[np.float64]:
    """Smoothed loss S, one value per loss.

    ``paper``: S_1 = L_1, S_m = alpha L_{m-1} + (1 - alpha) L_m, with the raw previous loss as
    arXiv 2405.04041, eq. 2 prints it. ``ema``: the previous *smoothed* loss on the right.

    Parameters
    ----------
    losses : (M,) one finite loss per point (an epoch, or a part of one).
    alpha : weight of the past, 0 <= alpha < 1.

    Returns
    -------
    (M,) float64.

    Raises
    ------
    MarkerError
        The losses are not a curve of finite numbers, or alpha or the method is out of range.
    """
    curve = _checked(losses)
    if not 0 <= alpha < 1:
        raise MarkerError(f"alpha is {alpha}: choose a weight of the past in [0, 1).")
    if method == "paper":
        return np.concatenate([curve[:1], alpha * curve[:-1] + (1 - alpha) * curve[1:]])
    if method != "ema":
        raise MarkerError(f"the smoothing method is {method!r}: choose 'paper' or 'ema'.")
    smoothed = curve.copy()
    for m in range(1, len(curve)):
        smoothed[m] = alpha * smoothed[m - 1] + (1 - alpha) * curve[m]
    return smoothed


def cqi(
    losses: Losses, alpha: float = 0.85, window: int = 10, method: Method = "paper"
) -> NDArray[np.float64]:
    """Convergence quantification indicator: the mean step of the smoothed loss.

    CQI_m is the mean of |S_j - S_{j-1}| over the last ``window`` points j = m-window+1 .. m, over
    those that exist where there are fewer (arXiv 2405.04041, eq. 3). The first point has no step,
    so its CQI is NaN.

    Returns
    -------
    (M,) float64, in the unit of the loss.
    """
    if window < 1:
        raise MarkerError(f"the CQI window is {window}: choose at least 1 point.")
    steps = np.abs(np.diff(smooth(losses, alpha, method)))
    means = [np.mean(steps[max(0, m - window) : m]) for m in range(1, len(steps) + 1)]
    return np.array([np.nan, *means][: len(steps) + 1])


@dataclass(frozen=True)
class Markers:
    """The epoch markers of one run.

    Attributes
    ----------
    points : K 1-based points E_1 .. E_K, strictly increasing; point E_k made score k.
    start : E_0, the point of the largest raw loss.
    converged : whether E_K is the first point with CQI <= mu; if not, it is the last point.
    mu : the threshold that was used, in the unit of the loss.
    """

    points: tuple[int, ...]
    start: int
    converged: bool
    mu: float


def epoch_markers(
    losses: Losses,
    phases: int = 10,
    mu: float = 1e-4,
    *,
    alpha: float = 0.85,
    window: int = 10,
    method: Method = "paper",
    relative: bool = False,
    unconverged: Literal["last", "error"] = "last",
) -> Markers:
    """Cut a run into ``phases`` equal falls of the log smoothed loss (arXiv 2405.04041, eq. 4-6).

    With l = log S, E_0 the point of the largest raw loss and E_K the first point with CQI <= mu,
    E_k is the first point m >= E_0 with l_{E_0} - l_m >= k (l_{E_0} - l_{E_K}) / K. The paper has
    absolute values there; they differ only where the smoothed loss goes on rising behind E_0, and
    then take the rise for a fall.

    Parameters
    ----------
    losses : (M,) mean training loss per point.
    relative : take ``mu`` times the largest smoothed loss as the threshold.
    unconverged : what happens if no CQI reaches mu: the ``last`` point serves as E_K, or an error.

    Raises
    ------
    MarkerError
        A loss that is not finite and positive, a setting out of range, more phases than points, no
        convergence with ``unconverged="error"``, no fall of the loss, or two phases that meet in
        one point.
    """
    smoothed, curve = smooth(losses, alpha, method), _checked(losses)
    if not mu >= 0:  # nor NaN
        raise MarkerError(f"mu is {mu}: choose a threshold of 0 or more.")
    if unconverged not in ("last", "error"):
        raise MarkerError(f"unconverged is {unconverged!r}: choose 'last' or 'error'.")
    if phases not in range(1, len(curve) + 1):
        raise MarkerError(
            f"{phases} phases were asked of {len(curve)} recorded points: "
            "choose between 1 and as many phases as there are points, or train for longer."
        )
    threshold = float(mu * smoothed.max()) if relative else float(mu)
    end, converged = _end(cqi(curve, alpha, window, method), threshold, unconverged)
    if smoothed[:end].min() <= 0:
        point = int(smoothed.argmin()) + 1
        raise MarkerError(
            f"the smoothed loss at point {point} is {smoothed[point - 1]:g}: markers need the "
            "logarithm of the loss, so use a loss that stays above zero."
        )
    start = int(curve.argmax()) + 1
    points = _crossings(np.log(smoothed[:end]), start, end, phases)
    return Markers(points, start, converged, threshold)


def maturity(
    losses: Losses, markers: Markers, *, alpha: float = 0.85, method: Method = "paper"
) -> NDArray[np.float64]:
    """How mature a run was at every point: the share of the fall in log loss that was reached.

    With l = log S, (l_{E_0} - l_m) / (l_{E_0} - l_{E_K}), kept between 0 and 1: 0 up to E_0, 1 from
    E_K on. Phase k of K begins where it first reaches k / K. 0 throughout where nothing falls.

    Parameters
    ----------
    losses : (M,) mean training loss per point.
    markers : of these losses, found with the same ``alpha`` and ``method``.

    Returns
    -------
    (M,) float64.
    """
    smoothed = smooth(losses, alpha, method)
    start, end = markers.start - 1, markers.points[-1] - 1
    log_loss = np.log(np.maximum(smoothed, np.finfo(np.float64).tiny))
    fall = log_loss[start] - log_loss[end]
    if fall <= 0:
        return np.zeros(len(log_loss))
    shares = (log_loss[start] - log_loss) / fall
    shares[: start + 1], shares[end:] = 0.0, 1.0
    return np.clip(shares, 0.0, 1.0)


class ConvergenceMonitor:
    """CQI of a running training loop, for early stopping or logging.

    Attributes
    ----------
    cqi : CQI of the last point, NaN before the second.
    converged : whether any point so far had CQI <= mu.

    With ``relative`` the threshold is mu times the largest smoothed loss *so far*.
    """

    def __init__(
        self,
        mu: float = 1e-4,
        *,
        alpha: float = 0.85,
        window: int = 10,
        method: Method = "paper",
        relative: bool = False,
    ) -> None:
        cqi([1.0], alpha, window, method)  # refuses bad settings at the door
        self.cqi, self.converged = float("nan"), False
        self._mu, self._alpha, self._method, self._relative = mu, alpha, method, relative
        self._steps: deque[float] = deque(maxlen=window)
        self._loss = self._smoothed = self._largest = float("nan")

    def update(self, loss: float) -> float:
        """Take the mean loss of one more epoch and return its CQI."""
        if not np.isfinite(loss):
            raise MarkerError(f"the loss is {loss}: lower the learning rate or check the data.")
        loss, previous = float(loss), self._smoothed
        past = self._loss if self._method == "paper" else previous
        first = np.isnan(previous)
        self._smoothed = loss if first else self._alpha * past + (1 - self._alpha) * loss
        self._loss = loss
        self._largest = float(np.fmax(self._largest, self._smoothed))
        if not first:
            self._steps.append(abs(self._smoothed - previous))
            self.cqi = float(np.mean(self._steps))
            limit = self._mu * self._largest if self._relative else self._mu
            self.converged = self.converged or self.cqi <= limit
        return self.cqi


def _checked(losses: Losses) -> NDArray[np.float64]:
    curve = np.asarray(losses, dtype=np.float64)
    if curve.ndim != 1 or not curve.size:
        raise MarkerError(f"the losses have shape {curve.shape}: give one number per point.")
    if not np.isfinite(curve).all():
        point = int(np.argmin(np.isfinite(curve))) + 1
        raise MarkerError(
            f"the loss at point {point} is {curve[point - 1]}: "
            "lower the learning rate or check the data, then train again."
        )
    return curve


def _end(
    indicator: NDArray[np.float64], mu: float, unconverged: Literal["last", "error"]
) -> tuple[int, bool]:
    below = np.flatnonzero(indicator <= mu)  # NaN compares false
    if below.size:
        return int(below[0]) + 1, True
    if unconverged == "error":
        least = np.nanmin(indicator) if len(indicator) > 1 else float("nan")
        raise MarkerError(
            f"no convergence in {len(indicator)} points: the least CQI is {least:.3g} and mu is "
            f"{mu:.3g}; train for longer, raise mu, or set unconverged to 'last'."
        )
    return len(indicator), False


def _crossings(log_loss: NDArray[np.float64], start: int, end: int, phases: int) -> tuple[int, ...]:
    if start >= end:
        raise MarkerError(
            f"the largest loss (point {start}) does not come before the end of training that is "
            f"judged (point {end}): lower the learning rate so that the loss falls."
        )
    fall = log_loss[start - 1] - log_loss
    full = fall[end - 1]
    if full < -1e-9:  # more than rounding
        raise MarkerError(
            f"the smoothed loss rises from its start (point {start}) to the end that is "
            f"judged (point {end}): lower the learning rate, or train for longer."
        )
    # A fall that equals k G / K must not miss it by the rounding of the logarithms.
    thresholds = np.arange(1, phases) * full / phases * (1 - 1e-12)
    reached = fall[start - 1 : end]
    inner = [start + int(np.argmax(reached >= threshold)) for threshold in thresholds]
    points = (*inner, end)
    _refuse_coinciding(points, start)
    return points


def _refuse_coinciding(points: tuple[int, ...], start: int) -> None:
    meeting = [
        (k, k + 1) for k, (a, b) in enumerate(zip((start, *points), points, strict=False)) if a == b
    ]
    if meeting:
        pairs = ", ".join(f"{a} and {b}" for a, b in meeting)
        raise MarkerError(
            f"phases {pairs} fall on the same point (the loss is judged from point {start} to "
            f"{points[-1]}), and equal weights cannot be told apart: record more points per epoch, "
            "lower the learning rate, or ask for fewer phases."
        )
