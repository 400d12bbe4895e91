"""Figures from a confusion matrix against scikit-learn and SciPy on the labels themselves."""

import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from fmce_ops.training.metrics import Figures, confusion
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    mean_absolute_error,
    precision_recall_fscore_support,
)

CLASSES = 7


@st.composite
def label_pairs(draw):
    """Truth and predictions of up to 80 rows; often only some of the classes occur."""
    rows = draw(st.integers(1, 80))
    occurring = draw(st.sets(st.integers(0, CLASSES - 1), min_size=1))
    labels = st.lists(st.sampled_from(sorted(occurring)), min_size=rows, max_size=rows)
    return draw(labels), draw(labels)


def of_labels(truth, predicted):
    matrix = confusion(torch.tensor(truth), torch.tensor(predicted), CLASSES)
    return Figures.of(matrix.numpy())


def expected(truth, predicted):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input, for which SciPy returns NaN
        correlation = float(spearmanr(truth, predicted).statistic) if len(truth) > 1 else math.nan
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=0
    )
    return {
        "accuracy": accuracy_score(truth, predicted),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "within_one": np.mean(np.abs(np.subtract(truth, predicted)) <= 1),
        "mae": mean_absolute_error(truth, predicted),
        "spearman": 0.0 if math.isnan(correlation) else correlation,
    }


@given(label_pairs())
@example(([3], [3]))
@example(([0, 1, 2], [4, 4, 4]))  # a constant prediction of a class that never occurs
@example(([2, 2, 2], [0, 1, 2]))  # a constant truth
@example(([0, 6, 0, 6], [6, 0, 6, 0]))
def test_figures_are_those_of_the_libraries(pair):
    assert asdict(of_labels(*pair)) == pytest.approx(expected(*pair), abs=1e-12)


@given(label_pairs())
def test_confusion_counts_rows_by_truth_and_columns_by_prediction(pair):
    counted = confusion(*map(torch.tensor, pair), CLASSES)
    assert counted.dtype == torch.int64
    np.testing.assert_array_equal(counted, confusion_matrix(*pair, labels=range(CLASSES)))


@given(st.lists(label_pairs(), min_size=1, max_size=4))
def test_the_matrices_of_parts_add_up_to_that_of_the_whole(parts):
    added = sum(confusion(*map(torch.tensor, pair), CLASSES) for pair in parts)
    truth, predicted = (torch.tensor([x for pair in parts for x in pair[i]]) for i in (0, 1))
    assert torch.equal(added, confusion(truth, predicted, CLASSES))


def test_figures_by_hand():
    # Truth 0 0 1 1 2 2, predictions 0 1 1 1 2 0.
    figures = of_labels([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0])
    assert figures.accuracy == pytest.approx(4 / 6)
    assert figures.precision == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert figures.recall == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert figures.f1 == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert figures.within_one == pytest.approx(5 / 6)
    assert figures.mae == pytest.approx((1 + 2) / 6)


def test_perfect_and_reversed_order():
    ordered = list(range(CLASSES)) * 3
    assert of_labels(ordered, ordered) == Figures(1, 1, 1, 1, 1, 0, pytest.approx(1))
    assert of_labels(ordered, ordered[::-1]).spearman == pytest.approx(-1)


def test_counts_beyond_what_labels_could_be_held_for():
    # 10^12 maps: as many rights as wrongs, all wrongs one class off.
    half = 250_000_000_000
    figures = Figures.of(np.array([[half, half], [half, half]]))
    assert asdict(figures) == pytest.approx(
        {
            "accuracy": 0.5,
            "precision": 0.5,
            "recall": 0.5,
            "f1": 0.5,
            "within_one": 1,
            "mae": 0.5,
            "spearman": 0,
        }
    )
