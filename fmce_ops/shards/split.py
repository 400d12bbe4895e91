"""Divide the rows of a store into training, validation and test, with equal counts per score."""

from typing import NamedTuple

import numpy as np

from fmce_ops.errors import ShardError
from fmce_ops.shards.vouch import Integers


class Split(NamedTuple):
    """Rows of each part, sorted: int64 arrays of shape (R, 2), each row a phase and a position."""

    train: Integers
    validation: Integers
    test: Integers


def split_by_image(images: int, phases: int, test: float, validation: float, seed: int) -> Split:
    """Put all maps of an image into one part, so that no image is judged that was trained on.

    Parameters
    ----------
    images, phases : int
        N and K of the store.
    test, validation : float
        Shares of the images, at least one image each unless the share is 0; the rest trains.
    seed : int

    Raises
    ------
    ShardError
        The shares leave no image to train on.
    """
    counts = _counts(images, test, validation)
    order = np.random.default_rng(seed).permutation(images)
    return _split(np.tile(order, (phases, 1)), counts)


def split_paper(images: int, phases: int, test: float, validation: float, seed: int) -> Split:
    """Draw the maps of each score on their own, as arXiv 2405.04041 appears to do.

    An image is then trained on under some scores and judged under others: for comparison only.
    Parameters, result and errors are those of `split_by_image`.
    """
    counts = _counts(images, test, validation)
    orders = np.tile(np.arange(images), (phases, 1))
    return _split(np.random.default_rng(seed).permuted(orders, axis=1), counts)


def _counts(images: int, test: float, validation: float) -> tuple[int, int]:
    """Images for test and validation."""
    possible = 0 <= test < 1 and 0 <= validation < 1
    tested, validated = (
        max(1, round(images * share)) if possible and share else 0 for share in (test, validation)
    )
    if not possible or tested + validated >= images:
        raise ShardError(
            f"Shares of {test} for test and {validation} for validation leave nothing of {images} "
            "images to train on: choose smaller shares or more images."
        )
    return tested, validated


def _split(orders: Integers, counts: tuple[int, int]) -> Split:
    """Cut the order of each phase, orders: (phases, images), at the same places."""
    test, validation, train = np.split(orders, np.cumsum(counts), axis=1)
    return Split(_rows(train), _rows(validation), _rows(test))


def _rows(positions: Integers) -> Integers:
    phases, each = positions.shape
    phase = np.repeat(np.arange(1, phases + 1), each)
    return np.column_stack([phase, np.sort(positions, axis=1).ravel()])
