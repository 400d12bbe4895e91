"""Figures of a classifier whose classes are ordered, all from one confusion matrix.

One (K, K) matrix of counts holds all that is needed, so memory does not grow with the data.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def confusion(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """(N,), (N,) class numbers 0 .. K-1 -> (K, K) int64 counts: row truth, column prediction."""
    pairs = truth * classes + predicted
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class Figures:
    """What a confusion matrix comes to; macro means are over the classes that occur.

    ``within_one``, ``mae`` (in classes) and ``spearman`` take the classes as ordered.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    within_one: float
    mae: float
    spearman: float

    @classmethod
    def of(cls, matrix: NDArray[np.int64]) -> "Figures":
        """``matrix``: (K, K) counts, row truth, column prediction."""
        counts = np.asarray(matrix, dtype=np.float64)
        total = counts.sum()
        precision, recall, f1 = _macro(counts)
        distance = np.abs(np.subtract.outer(np.arange(len(counts)), np.arange(len(counts))))
        return cls(
            accuracy=float(np.trace(counts) / total),
            precision=precision,
            recall=recall,
            f1=f1,
            within_one=float(counts[distance <= 1].sum() / total),
            mae=float((counts * distance).sum() / total),
            spearman=_spearman(counts),
        )


def _macro(counts: NDArray[np.float64]) -> tuple[float, float, float]:
    hits, predicted, actual = np.diag(counts), counts.sum(0), counts.sum(1)
    occurring = (predicted + actual) > 0
    precision = _ratio(hits, predicted)[occurring]
    recall = _ratio(hits, actual)[occurring]
    f1 = _ratio(2 * hits, predicted + actual)[occurring]
    return float(precision.mean()), float(recall.mean()), float(f1.mean())


def _ratio(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _spearman(counts: NDArray[np.float64]) -> float:
    """Correlation of mid-ranks; 0 where one side is constant and no order can be seen."""
    truth, predicted = _centred_ranks(counts.sum(1)), _centred_ranks(counts.sum(0))
    covariance = truth @ counts @ predicted
    spread = (truth**2 @ counts.sum(1)) * (predicted**2 @ counts.sum(0))
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def _centred_ranks(marginal: NDArray[np.float64]) -> NDArray[np.float64]:
    ranks = np.cumsum(marginal) - marginal / 2
    return ranks - marginal.sum() / 2
