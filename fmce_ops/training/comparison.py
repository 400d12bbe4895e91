"""Paired differences between arms that were trained with the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % confidence interval; no interval for a single pair."""

    mean: float
    low: float | None
    high: float | None


def paired(ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of ``ours - theirs``, pair by pair."""
    from scipy.stats import t

    differences = np.subtract(ours, theirs)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Interval(mean, None, None)
    half = t.ppf((1 + confidence) / 2, count - 1) * differences.std(ddof=1) / np.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half))
